"""Code beside packed weights, if it is asked for: by it `trust_remote_code=True` loads them where nothing imported paredown.

transformers then runs the file that `auto_map` in config.json names, which imports paredown: that must be installed.
"""

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.errors import PareError

CODE = "modeling_paredown.py"
# if paredown is missing, transformers names it, and the command that installs it, before it runs this file
TEXT = '''"""Lets transformers load the weights in this folder with trust_remote_code=True. paredown must be installed."""

from paredown.compress.checkpoint.remote_code import Config  # noqa: F401
'''


class Config:
    """What `auto_map` names in the place of a config class: AutoConfig, which knows our model types by now."""

    @staticmethod
    def register_for_auto_class(auto_class: str = "AutoConfig") -> None:
        """As of a config class: the code goes along where it is saved. Ours does not, for it is imported already."""

    @staticmethod
    def from_pretrained(folder: Any, **options: Any) -> Any:
        """As of AutoConfig. Raises PareError in a process of vLLM's that cannot have our plugin, and would not say so."""
        if "vllm" in sys.modules and not entry_points(group="vllm.general_plugins", name="paredown"):
            raise PareError(
                "vLLM finds paredown's plugin by the installed package, and here paredown is only on the path of modules: "
                "install it beside vLLM with pip install --no-deps ."
            )
        from transformers import AutoConfig

        transformers_plugin.register()
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)


def check_packed(format: str) -> None:
    """Raises PareError for a format of checkpoints that load without code of ours, or not in transformers."""
    if format != "packed":
        raise PareError(f"--remote-code is for packed checkpoints, and {format} ones do not load by it: leave it out.")


def add_code(folder: Path) -> list[str]:
    """Write the file, and name it in the config.json that is there. Returns its name; none for an ordinary checkpoint."""
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if transformers_plugin.dense_model_type(settings["model_type"]) == settings["model_type"]:
        return []
    settings["auto_map"] = {"AutoConfig": f"{CODE.removesuffix('.py')}.{Config.__name__}"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    (folder / CODE).write_text(TEXT, encoding="utf-8", newline="\n")
    return [CODE]
