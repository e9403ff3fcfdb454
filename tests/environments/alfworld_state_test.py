import pytest

from skillsd_jax.environments.alfworld_state import Facts, negated, read_atom

TYPES = {
    "desk": frozenset({"receptacle"}),
    "shelf": frozenset({"receptacle"}),
    "pen": frozenset({"thing"}),
    "mug": frozenset({"thing"}),
}
THING, PLACE = ("o", "thing"), ("r", "receptacle")


@pytest.fixture
def facts():
    pairs = [("pen", "desk"), ("mug", "desk"), ("mug", "mug"), ("shelf", "desk")]
    inside = [("in", pair) for pair in pairs]
    return Facts([*inside, ("open", ("desk",))], TYPES)


def test_matches_come_sorted_and_obey_types(facts):
    found = list(facts.matches((("in", (THING, PLACE)),), {}))
    assert found == [{THING: "mug", PLACE: "desk"}, {THING: "pen", PLACE: "desk"}]


def test_a_bound_placeholder_restricts_matches(facts):
    query = (("in", (THING, PLACE)), ("open", (PLACE,)))
    assert list(facts.matches(query, {THING: "pen"})) == [{THING: "pen", PLACE: "desk"}]
    assert list(facts.matches(query, {PLACE: "shelf"})) == []


def test_two_placeholders_are_never_filled_alike(facts):
    other = ("p", "thing")
    query = (("in", (THING, PLACE)), ("in", (other, PLACE)))
    pairs = [(m[THING], m[other]) for m in facts.matches(query, {})]
    assert pairs == [("mug", "pen"), ("pen", "mug")]


def test_adding_twice_and_removing_what_is_not_there_change_nothing(facts):
    facts.add(("open", ("desk",)))
    facts.remove(("open", ("shelf",)))
    assert facts.of("open") == [("desk",)]
    facts.remove(("open", ("desk",)))
    assert facts.of("open") == []


def test_negated_atom_is_a_fact_of_its_own():
    fact = read_atom("NegatedAtom in(pen, desk)")
    assert fact == ("not_in", ("pen", "desk"))
    assert negated(fact) == ("in", ("pen", "desk")) == read_atom("Atom in(pen, desk)")
    assert read_atom("Atom won()") == ("won", ())
