"""Puts several versions of a model behind one address: weights, sticky users, shadows, fallback when a server is unhealthy.

python deploy/route.py name=chat versions.stable.url=http://127.0.0.1:8001 versions.next.url=http://127.0.0.1:8002
python deploy/route.py config=router.yaml

The file is read again when it changes, and at SIGHUP, without losing a request; what the line says stays. Exit codes: 0 stopped
by a signal after running requests ended, 1 failed, 2 bad input.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from deploy.limits import AT_START, ListeningKeys
from deploy.listening import Server, allow_files, bind
from deploy.routing.health import Rules
from deploy.routing.router import Router, Table, create_app
from deploy.routing.table import PREFIX, VersionKeys, read_versions, split
from nemo_ext.command_line import NO_DEFAULT, ending, fill, key, key_lines, settings
from nemo_ext.errors import UserError

EXAMPLE = "python deploy/route.py name=chat versions.stable.url=http://127.0.0.1:8001 versions.next.url=http://127.0.0.1:8002"
LOOK = 0.5  # seconds between two looks at the file


@dataclass
class Own:
    """The command's keys beside those of the network and of the versions."""

    name: str = key(NO_DEFAULT, "what clients call the model; a version's name asks for it alone")
    user_header: str = key("x-user-id", "a header that names the user; without it, OpenAI's field user does", group="routing")
    shadow_running: int = key(16, "copies that a shadow works on at a time; more are not sent")
    shadow_timeout: float = key(60.0, "for a copy", unit="s")
    probe_every: float = key(2.0, "between two looks at a server's ready path", unit="s", group="health")
    probe_timeout: float = key(2.0, "for its answer", unit="s")
    failures: int = key(3, "failed requests in a row after which a server is left alone")
    cooldown: float = key(5.0, "until it is tried with one request; doubles with each failed try, to 16 times", unit="s")
    connect_timeout: float = key(2.0, "for a connection to a server", unit="s")


@dataclass
class Options(ListeningKeys, Own):
    """The command's keys, beside those of the versions."""

    port: int = key(8080, "the port; 0 takes a free one")
    api_keys: str | None = key(None, "a file with a key a line; clients send one as bearer", auto="the servers decide")


def load(arguments: Sequence[str]) -> tuple[Options, Table] | None:
    """The keys and the table of a command line and its file, or None if it asks for help. Raises UserError."""
    given, help = settings([a for a in arguments if a not in ("debug=true", "debug=false")], EXAMPLE)
    if help:
        return None
    rest, versions = split(given)
    options = fill(Options, rest)
    check(options)
    table = Table(
        name=options.name,
        versions=read_versions(versions, options.name),
        rules=Rules(options.probe_every, options.probe_timeout, options.failures, options.cooldown),
        user_header=options.user_header,
        connect_seconds=options.connect_timeout,
        shadow_most=options.shadow_running,
        shadow_seconds=options.shadow_timeout,
    )
    return options, table


def check(options: Options) -> None:
    """Raises UserError for values that no router can have."""
    options.check_listening()
    for name in ("shadow_running", "failures"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be 1 or more")
    for name in ("shadow_timeout", "probe_every", "probe_timeout", "cooldown", "connect_timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"{name}={getattr(options, name)} must be above 0")
    if not options.user_header.replace("-", "").isalnum():
        raise UserError(f"user_header={options.user_header} is no header's name")


class Reloader:
    """Keeps a router's table that of the file."""

    def __init__(self, router: Router, arguments: Sequence[str], options: Options) -> None:
        self._router, self._arguments, self._options = router, arguments, options
        found = next((a.partition("=")[2] for a in arguments if a.startswith("config=")), None)
        self._file = Path(found) if found else None
        self._known = self._stamp()
        self._lock = asyncio.Lock()

    async def reload(self) -> None:
        """Read the table again. One that is wrong is said in a line, and the one in force stays."""
        async with self._lock:
            try:
                options, table = load(self._arguments)
                for name in AT_START:
                    if getattr(options, name) != getattr(self._options, name):
                        raise UserError(f"{name}={getattr(options, name)} needs a restart")
                await self._router.install(table)
            except UserError as problem:
                print(f"error: {problem}; the table in force stays", file=sys.stderr, flush=True)
            else:
                print(f"reloaded: {describe(table)}", flush=True)
                self._count("done", 1)
                return
            self._count("refused", 0)

    async def follow(self) -> None:
        """Reload when the file has changed and rests, for ever."""
        seen = self._known
        while self._file is not None:
            await asyncio.sleep(LOOK)
            now = self._stamp()
            if now == seen != self._known:
                self._known = now
                await self.reload()
            seen = now

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            stat = self._file.stat() if self._file else None
        except OSError:
            return None
        return stat and (stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _count(self, outcome: str, good: int) -> None:
        self._router.metrics.reloads.labels(outcome).inc()
        self._router.metrics.config_good.set(good)


def describe(table: Table) -> str:
    """The versions in a line."""
    total = sum(version.weight for version in table.versions)
    return ", ".join(
        f"{v.name} {f'shadow {v.shadow:.0%}' if v.shadow else f'{v.weight / total:.0%}' if v.weight else 'reserve'}"
        for v in table.versions
    )


def run(arguments: Sequence[str], options: Options, table: Table) -> None:
    """Serve until a signal."""
    keys = options.keys()
    allow_files(options.connections)
    listener = bind(options.host, options.port)

    @asynccontextmanager
    async def background(router: Router) -> AsyncIterator[None]:
        await router.install(table)
        reloader = Reloader(router, arguments, options)
        loop, tasks = asyncio.get_running_loop(), {asyncio.create_task(reloader.follow())}

        def hang_up() -> None:
            tasks.add(task := asyncio.create_task(reloader.reload()))
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        waiting = "" if router.usable() else "; no server is ready yet"
        print(f"{describe(table)}{waiting}: http://{options.host}:{listener.getsockname()[1]}", flush=True)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    try:
        router = Router(options.limits())
        Server(create_app(router, keys, background), router, lifespan="on").run(sockets=[listener])
    finally:
        listener.close()


def main(arguments: list[str]) -> int:
    """The command. Returns its exit code."""
    with ending("debug=true" in arguments, "nobody was served") as end:
        loaded = load(arguments or ["--help"])
        if loaded is None:
            lines = [line.replace("  ", f"  {PREFIX}NAME.", 1) if line[2] != " " else line for line in key_lines(VersionKeys)]
            print("\n".join([__doc__, f"  {EXAMPLE}", "", *key_lines(Options), "", "versions", *lines]))
        else:
            run(arguments, *loaded)
    return end.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
