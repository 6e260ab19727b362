"""What a bundle must be able to hold, judged from numbers alone, so that nobody trains for a result that is refused.

Imports no torch; `bundle` writes the file and has the last word.
"""

from typing import Final

from mistudio_schemas import ErrorCode
from mistudio_train.errors import CorpusRefused, ExportRefused
from mistudio_train.messages import JobSpec

MIN_ROWS: Final = 2
"""miStudioFind compares rows."""


def refuse_hopeless(spec: JobSpec, texts: int, d_in: int) -> None:
    """Refuse a job whose bundle cannot be written as it is asked for.

    Args:
        spec: the job.
        texts: how many the corpus has.
        d_in: width of an activation.

    Raises:
        CorpusRefused: if there are fewer than two texts.
        ExportRefused: if the bundle shall be complete and is larger than it may be.

    """
    if texts < MIN_ROWS:
        raise CorpusRefused(
            f"{spec.request.corpus_file} has {texts} text, and a result needs {MIN_ROWS}",
            "Give a corpus of more texts: of a .txt file each line is one.",
            ErrorCode.CORPUS_EMPTY,
        )
    for sae in spec.request.resolved_saes():
        least = 4 * texts * (d_in + (sae.hidden_dim or 0))
        if spec.request.bundle_complete and least > spec.bundle_max_bytes:
            raise ExportRefused(
                f"feature_activations.pt needs more than {least:,} bytes for all rows, and its limit is "
                f"{spec.bundle_max_bytes:,}",
                f"Set bundle_max_bytes to {least + least // 8} or more, or do without bundle_complete.",
            )
