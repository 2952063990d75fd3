"""Recipes of a corpus: files and options to checked values, and one sentence for what is wrong."""

from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.recipe import Decisions, Measures, Recipe
from data_tools.recipe_file import changed, leaves, read_recipe
from data_tools.rules import RULES, chain

RECIPES = Path(__file__).parents[2] / "recipes"


def test_without_a_file_a_recipe_is_the_default() -> None:
    assert read_recipe(None) == Recipe()


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("decisions: {near_duplicates: 1}\nrules: [normalize, {rule: length, min_words: 3}]\n")
    assert read_recipe(file) == Recipe(
        rules=[{"rule": "normalize"}, {"rule": "length", "min_words": 3}],
        decisions=Decisions(near_duplicates=1.0),
    )
    file.write_text("")
    assert read_recipe(file) == Recipe()


def test_options_change_single_values_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("decisions: {near_duplicates: 0.9, heldout: 0.5}\n")
    options = {
        "decisions.near_duplicates": "null",
        "decisions.licenses": "[commercial, unknown]",
        "measures.test_sets": "{pubmedqa: a.jsonl}",
        "require_pmc_id": "false",
    }
    assert read_recipe(file, options) == Recipe(
        require_pmc_id=False,
        measures=Measures(test_sets={"pubmedqa": "a.jsonl"}),
        decisions=Decisions(licenses=["commercial", "unknown"], heldout=0.5),
    )


def test_decisions_of_a_corpus_are_changed_by_the_same_options() -> None:
    now = Decisions(near_duplicates=0.8, heldout=0.1)
    assert changed(now, {"decisions.near_duplicates": "0.7"}, "decisions.") == Decisions(0.7, heldout=0.1)
    with pytest.raises(UserError, match=r"unknown key decisions\.heldot"):
        changed(now, {"decisions.heldot": "0.7"}, "decisions.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("heldout: 0.1", "unknown key heldout"),
        (
            "decisions: {near_duplicate: 1}",
            r"unknown key decisions\.near_duplicate \(did you mean near_duplicates\?\)",
        ),
        ("decisions: {heldout: many}", r"decisions\.heldout is 'many'; expected a number"),
        ("decisions: {heldout: true}", r"decisions\.heldout is True; expected a number"),
        ("decisions: {heldout: .nan}", r"decisions\.heldout is nan; expected a number"),
        ("decisions: 3", "decisions has to be keys with values, not 3"),
        (
            "decisions: {licenses: commercial}",
            r"decisions\.licenses is 'commercial'; expected a list of text",
        ),
        ("measures: {near_duplicates: 0.8}", r"measures\.near_duplicates is 0\.8; expected true or false"),
        ("measures: {test_sets: [a]}", r"measures\.test_sets is \['a'\]; expected names with text"),
        ("max_bad: 2", r"max_bad is 2\.0; give a share of records from 0 to 1"),
        ("require_pmc_id: 'yes'", "require_pmc_id is 'yes'; expected true or false"),
        ("rules: normalize", "rules is 'normalize'; expected a list of rules"),
        ("rules: [3]", "rule 1 is 3; expected a name"),
        ("rules: [normalize, lenght]", r"rule 2: there is no rule lenght \(did you mean length\?\)"),
        ("rules: [{rule: length, words: 3}]", "length has no parameter words"),
        (
            "rules: [{rule: length, min_words: 0.5}]",
            "min_words of rule 1, length, is 0.5; expected a whole number",
        ),
        (
            "rules: [{rule: normalize, form: NFKC}]",
            "form of rule 1, normalize, is 'NFKC'; expected none or NFC",
        ),
        ("- rules", "a recipe has to be keys with values"),
        ("rules: [", "is not YAML"),
        ("max_bad: 0.1\nmax_bad: 0.2", "the key max_bad is given twice"),
        ("decisions: {heldout: 0.1, heldout: 0.2}", "the key heldout is given twice"),
        ("rules: !!python/object:os.system []", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_file_key_and_what_is_expected(
    content: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_recipe(file)
    if "max_bad" not in content:
        assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        "{a: x, a: y}",
        "[",
        "!!int x",
        "!!timestamp x",
        "2001-99-99",
        "!!python/name:os.system",
        "9" * 5000,
        "[" * 400,
        "*a",
        "{[]: 1}",
    ],
)
def test_the_value_of_an_option_that_is_not_sound_yaml_is_one_short_sentence(value: str) -> None:
    with pytest.raises(
        UserError, match=r"^The value .* of the option --measures\.test_sets is not YAML"
    ) as error:
        read_recipe(None, {"measures.test_sets": value})
    assert len(str(error.value)) < 500


def test_aliases_without_end_are_one_short_sentence(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    lists = [f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9)]
    file.write_text("\n".join(["a0: &a0 [x]", *lists, "max_bad: *a9"]))
    with pytest.raises(UserError, match="unknown key a0"):
        read_recipe(file)
    file.write_text("max_bad: {" + ", ".join(["a0: &a0 [x]", *lists]) + "}")
    with pytest.raises(UserError, match=r"max_bad is .*expected a number") as error:
        read_recipe(file)
    assert len(str(error.value)) < 500


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_every_rule_has_parameters_that_a_recipe_can_give() -> None:
    for name, rule in RULES.items():
        parameters = vars(rule())
        (made,) = chain([{"rule": name, **parameters}])
        assert made == rule()


def test_the_recipes_of_the_repository_are_sound() -> None:
    full, plain = (read_recipe(RECIPES / f"corpus_{name}.yaml") for name in ("pmc", "plain"))
    assert [rule["rule"] for rule in full.rules] == list(RULES)
    assert full.measures.near_duplicates
    assert full.decisions.near_duplicates == 0.8
    assert plain == Recipe(require_pmc_id=False, rules=[])


def test_every_value_but_the_chain_can_be_given_as_an_option() -> None:
    assert set(leaves(Recipe)) == {
        "require_pmc_id",
        "measures.near_duplicates",
        "measures.test_sets",
        "decisions.near_duplicates",
        "decisions.contamination",
        "decisions.licenses",
        "decisions.heldout",
        "max_bad",
    }
