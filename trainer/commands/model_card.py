"""The model card of an export, from the texts in `model_card.md`: the card, and the code that uses each file."""

from pathlib import Path, PurePath
from typing import Any

from trainer.commands.loaded import MERGED
from trainer.commands.text import number
from trainer.text import listed

_TEXTS = Path(__file__).with_name("model_card.md")  # each after a line with its name: @@ NAME


def model_card(about: dict[str, Any], name: str) -> str:
    """The README.md of an export. It names files, but not the folders that they are in: those are private.

    Args:
        about: the content of model.json.
        name: of the run.
    """
    builder, classes, config = dict(about["builder"] or {}), about["classes"], about["config"]
    own = not builder
    values = {**about, **about["input"], "name": name, "count": len(classes)}
    values["model"] = builder.pop("name", "a module of your own")
    values["origin"] = "A module of the recipe" if own else f"torchvision's `{values['model']}`"
    values["recipe"] = ', recipe="my_recipe.py"' if own else ""
    shape = f"float [B, {len(values['mean'])}, {values['size']}, {values['size']}]"
    values["images"] = "uint8 [B, 3, H, W], of any size" if about["preprocessing"] else shape
    values["arguments"] = "".join(f", {key}={value!r}" for key, value in builder.items())
    values["classes"] = listed(classes, 50)
    validation = sorted(about["metrics"].get("val", {}).items())
    values["val"] = ", ".join(f"{key} {number(value)}" for key, value in validation)
    values["base"] = " ".join(f"{key} {public(value)}" for key, value in about["base"].items())
    values["train"] = " ".join(config["model"]["train"])
    values["data"] = public(config["data"]["data"])
    parts = f"\n{_TEXTS.read_text(encoding='utf-8')}".rstrip().split("\n@@ ")
    texts = dict(part.split("\n", 1) for part in parts[1:])
    if own:
        texts[MERGED] = texts[f"own {MERGED}"]
    uses = [f"## {file}\n\n```python\n{texts[file].format(**values)}\n```\n" for file in about["files"]]
    auxiliary = "\nIt has no auxiliary classifiers: torchvision's `{model}` takes it with `aux_logits=False`.\n"
    values["auxiliary"] = auxiliary.format(**values) if "aux_logits" in builder else ""
    rows = []
    for file, facts in about["files"].items():
        difference = f"{facts['largest_difference']:.1e}" if facts["largest_difference"] else "none, to the bit"
        rows.append(f"| `{file}` | {facts['compared_on']} | {difference} | `{facts['sha256'][:16]}…` |")
    return texts["card"].format(**{**values, "uses": "\n".join(uses), "rows": "\n".join(rows)}) + "\n"


def public(value: Any) -> Any:
    """A value without private folders: of an absolute path only the last part."""
    path = value.removeprefix("file://") if isinstance(value, str) else ""
    if "://" not in path and PurePath(path).is_absolute():
        return PurePath(path).name
    return value
