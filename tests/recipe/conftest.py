"""Small configs of RWKV-infctx-trainer, translated and read back."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infctx.recipe.from_infctx import Translation, translate_config
from infctx.recipe.load import load_recipe
from infctx.recipe.schema import Recipe


class Config:
    """A config that a test gives the keys of."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.trainer: dict[str, Any] = {"max_epochs": 1}
        self.model: dict[str, Any] = {"load_model": "m.pth", "lr_init": "1e-4"}
        self.data: dict[str, Any] = {"source": "some/set", "test_split_shuffle": True}
        # What that trainer does without being told, as keys of our optimizer.
        self.always: dict[str, Any] = {"warmup_steps": 0, "clip": None, "l2_wrap": 1e-4}

    def raw(self, config: object, name: str = "config.yaml") -> Translation:
        """Of a whole config, as a mapping or as YAML."""
        text = config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
        path = self._folder / name
        path.write_text(text, encoding="utf-8")
        return translate_config(path)

    def translate(self, **sections: Any) -> Translation:
        """Of a small config with these keys on top."""
        base: dict[str, Any] = {"trainer": self.trainer, "model": self.model, "data": self.data}
        config = {name: {**keys, **sections.pop(name, {})} for name, keys in base.items()}
        return self.raw({**sections, **config})

    def load(self, translation: Translation) -> Recipe:
        """What load_recipe makes of it."""
        path = self._folder / "recipe.yaml"
        path.write_text(translation.text, encoding="utf-8")
        return load_recipe(path)

    def recipe(self, **sections: Any) -> Recipe:
        return self.load(self.translate(**sections))

    def of(self, translation: Translation, key: str) -> tuple[str, str]:
        """Kind and text of the outcome of a key, which must be one."""
        found = [(one.kind, one.text) for one in translation.outcomes if one.key == key]
        assert len(found) == 1, found
        return found[0]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path)
