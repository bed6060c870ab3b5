"""The table: what is refused, whose turn it is, and a server's circuit."""

import pytest

from deploy import route
from deploy.routing.health import Circuit, Rules
from deploy.routing.table import Version, order
from nemo_ext.errors import UserError

A = "versions.a.url=http://127.0.0.1:1"
B = "versions.b.url=http://127.0.0.1:2"


def versions(**weights: float) -> list[Version]:
    return [Version(name, ("http://x",), weight, 0.0, "m") for name, weight in weights.items()]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([A], "name= is missing"),
        (["name=m"], "there are no versions"),
        (["name=m", "versions=3"], "holds no versions"),
        (["name=m", "versions.a=3"], "versions.a is not versions.NAME.KEY"),
        (["name=m", "versions.a b.url=http://x"], "a NAME is letters"),
        (["name=m", A, "prot=3"], "unknown key prot, did you mean port"),
        (["name=m", A, "versions.a.wieght=3"], "unknown key versions.a.wieght, did you mean weight"),
        (["name=m", "versions.a.weight=1"], "versions.a.url= is missing"),
        (["name=m", A, "versions.a.weight=-1"], "weight=-1.0 must be 0 or more"),
        (["name=m", A, "versions.a.weight=.nan"], "weight=nan must be 0 or more"),
        (["name=m", A, "versions.a.weight=much"], "versions.a.weight=much must be a number"),
        (["name=m", A, "versions.a.weight=0"], "nobody would answer"),
        (["name=m", A, B, "versions.b.shadow=2"], "shadow=2 must be above 0 and at most 1"),
        (["name=m", A, B, "versions.b.shadow=0.5", "versions.b.weight=1"], "exclude each other"),
        (["name=m", A, "versions.a.url=x"], "versions.a.url= is given twice"),
        (["name=m", "versions.a.url=127.0.0.1:1"], "is no address"),
        (["name=m", "versions.a.url=http://h:99999"], "is no address"),
        (["name=m", "versions.a.url=http://u:secret@h"], "versions.a.url= holds a password"),
        (["name=m", "versions.a.url=http://h/v1/"], "leave that away"),
        (["name=m", "versions.a.url=http://h,http://h/"], "a server twice"),
        (["name=m", A, "versions.a.ready=health"], "must begin with /"),
        (["name=m", A, "versions.a.api_key=nowhere"], "cannot be read"),
        (["name=a", A], "versions.a has the name"),
        (["name=m", A, "timeout=.inf"], "timeout=inf must be above 0"),
        (["name=m", A, "failures=0"], "failures=0 must be 1 or more"),
        (["name=m", A, "port=70000"], "0 to 65535"),
        (["name=m", A, "user_header=x y"], "no header's name"),
    ],
)
def test_refused_in_a_line(arguments, words):
    with pytest.raises(UserError, match=words) as refusal:
        route.load(arguments)
    assert "secret" not in str(refusal.value)


def test_a_file_and_the_line_over_it(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    file = tmp_path / "router.yaml"
    file.write_text(f"""
name: chat
versions:
  v1.0: {{url: [http://a:1/, "http://b:2"], weight: 9, model: llama, api_key: {tmp_path}/key}}
  v2.0: {{url: "http://c:3", ready: /health}}
  dark: {{url: "http://d:4", shadow: 0.25}}
failures: 5
""")
    options, table = route.load([f"config={file}", "versions.v1.0.weight=3", "port=0"])
    assert options.port == 0 and table.rules.failures == 5
    assert table.versions == (
        Version("v1.0", ("http://a:1", "http://b:2"), 3.0, 0.0, "llama", "/ready", "secret"),
        Version("v2.0", ("http://c:3",), 1.0, 0.0, "chat", "/health"),
        Version("dark", ("http://d:4",), 0.0, 0.25, "chat"),
    )
    assert route.describe(table) == "v1.0 75%, v2.0 25%, dark shadow 25%"


def test_commands_end_as_all_do(capsys):
    assert route.main(["--help"]) == 0
    assert "versions.NAME.weight=" in capsys.readouterr().out
    assert route.main(["name=m"]) == 2
    assert capsys.readouterr().err == "error: there are no versions: versions.NAME.url=http://…; --help shows the keys\n"


def test_shares_and_fallback():
    """Firsts are shared 6:3:1, and where a is away b and c have 3:1; the reserve is last."""
    rows = [order(versions(a=6, b=3, c=1, spare=0), f"user {i}") for i in range(20_000)]
    firsts = [row[0].name for row in rows]
    assert [firsts.count(name) / 20_000 for name in "abc"] == pytest.approx([0.6, 0.3, 0.1], abs=0.012)
    seconds = [row[1].name for row in rows if row[0].name == "a"]
    assert seconds.count("b") / len(seconds) == pytest.approx(0.75, abs=0.015)
    assert all(row[-1].name == "spare" for row in rows)


def test_a_new_share_moves_no_more_users_than_it_must():
    users = [f"user {i}" for i in range(10_000)]
    before = {user: order(versions(a=9, b=1), user)[0].name for user in users}
    after = {user: order(versions(a=9, b=3), user)[0].name for user in users}  # b: 10% to 25%
    moved = [user for user in users if before[user] != after[user]]
    assert all(after[user] == "b" for user in moved)
    assert len(moved) / 10_000 == pytest.approx(0.15, abs=0.015)


def test_the_circuit():
    rules, circuit = Rules(failures=2, cooldown=10), Circuit()
    circuit.failed(0, rules)
    circuit.succeeded()
    circuit.failed(0, rules)
    assert circuit.allows(0)  # two, but not in a row
    circuit.failed(0, rules)
    assert not circuit.allows(9.9) and circuit.allows(10)
    circuit.take()
    assert not circuit.allows(10)  # one request tries
    circuit.left()
    assert circuit.allows(10)  # it told nothing
    circuit.take()
    circuit.failed(10, rules)
    assert not circuit.allows(29) and circuit.allows(30)  # twice as long
    circuit.take()
    circuit.succeeded()
    assert circuit.closed and circuit.allows(30)
    circuit.failed(30, rules)
    circuit.failed(30, rules)
    assert not circuit.allows(39) and circuit.allows(40)  # as at first
