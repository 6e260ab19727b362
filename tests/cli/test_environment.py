"""`--env-file`: what its lines mean, and that nothing is read that nobody named."""

from pathlib import Path

import pytest

from mistudio_train.cli.environment import load_settings, use_env_file
from mistudio_train.cli.errors import CliError


def test_lines_mean_what_a_shell_takes_them_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAFKA_GROUP_ID", "MINIO_BUCKET", "KAFKA_TOPIC_PREFIX"):
        monkeypatch.setenv(name, "from-the-environment")
    file = tmp_path / "env"
    file.write_text("# a stack\n\nexport KAFKA_GROUP_ID='my group'\nMINIO_BUCKET=a=b # comment\nKAFKA_TOPIC_PREFIX=\n")
    use_env_file(file)
    settings = load_settings()
    assert settings.kafka_group_id == "my group"
    assert settings.minio_bucket == "a=b"
    assert settings.kafka_topic_prefix == ""


@pytest.mark.parametrize("line", ["KAFKA", "two words=1", "=1", "A='open"])
def test_a_line_that_assigns_nothing_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(f"# first\n{line}\n")
    with pytest.raises(CliError, match="line 2 is not KEY=VALUE"):
        use_env_file(file)


def test_a_file_that_nobody_named_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_GROUP_ID", raising=False)
    (tmp_path / ".stack").mkdir()
    for name in (".env", ".stack/env"):
        (tmp_path / name).write_text("KAFKA_GROUP_ID=surprise\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings().kafka_group_id == "mistudio-train"
