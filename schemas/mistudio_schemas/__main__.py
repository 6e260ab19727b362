"""`python -m mistudio_schemas FOLDER` writes the JSON Schema of every event."""

import json
import sys
from pathlib import Path

from .kafka import EVENT_TYPES


def json_schemas() -> dict[str, str]:
    """File name to text of each event's JSON Schema (draft 2020-12)."""
    return {
        f"{name.removeprefix('mistudio.')}.json": json.dumps(
            {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{name.replace('.', ':')}"}
            | model.model_json_schema(),
            indent=2,
        )
        + "\n"
        for name, model in EVENT_TYPES.items()
    }


def main() -> None:
    """Write the files into the folder that the first argument names, `schemas/json` by default."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "schemas/json")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in json_schemas().items():
        (folder / name).write_text(text)
        print(folder / name)


if __name__ == "__main__":
    main()
