"""Every built-in reward has a page that says what it does, and a recipe on it that loads."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from rewards.base import BUILT_IN, RewardConfig, resolve

PAGES = Path(__file__).parents[2] / "docs" / "rewards"
HEADINGS = ["Formula", "Range", "Failure modes", "How it was hacked in practice, and what stops it"]


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_built_in_reward_has_a_page(name):
    text = (PAGES / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
    sections = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert all(len(section.split()) >= 5 for section in sections)
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    configs = [RewardConfig(**each) for text in examples for each in yaml.safe_load(text)["rewards"]["functions"]]
    assert name in [config.path for config in configs]
    for config in configs:
        assert config.params.keys() <= inspect.signature(resolve(config.path)).parameters.keys()


def test_the_docstring_of_the_recipe_names_all_of_them():
    assert f"built-in ({', '.join(sorted(BUILT_IN))})" in " ".join(str(RewardConfig.__doc__).split())
