"""A mix that an older version compiled is compiled again, not taken for a bug."""

import numpy as np

from toolkit import recipe as recipes
from toolkit.data import cache
from toolkit.data.mix import compile_mix, of_run


def test_a_cached_mix_of_an_older_format_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_OUTPUTS", str(tmp_path))
    recipe = recipes.load("data_recipes/pocket.yaml", ["data.budget=2000", "data.validation_size=4"])
    mixed = compile_mix(recipe)
    with np.load(mixed.folder / "mix.npz") as file:
        older = {name: array for name, array in file.items() if name != "texts"}
    np.savez(mixed.folder / "mix.npz", **older)
    assert cache.read(mixed.folder) is None
    again = of_run(recipe, {"mix": mixed.folder.name, "data": {}, "started": "once"})
    assert [row.ids.tolist() for row in again.train] == [row.ids.tolist() for row in mixed.train]
