"""Rows, copies and order, against a cache that only remembers whose tokens lie where."""

import random

from deploy.engine.request import Request, Sampling
from deploy.engine.scheduler import Group, Scheduler


def test_rows_always_hold_their_own_tokens():
    for seed in range(30):
        chance = random.Random(seed)
        rows = chance.randint(1, 6)
        scheduler, cache = Scheduler(rows, prefill_tokens=chance.randint(1, 12)), [[] for _ in range(rows)]
        arrived, admitted = [], []

        def apply(copies, cache=cache):
            for sources, targets, length in copies:
                for target, tokens in zip(targets, [list(cache[s][:length]) for s in sources], strict=True):
                    cache[target][:length] = tokens

        for number in range(25):
            prompt = tuple(number * 1000 + i for i in range(chance.randint(1, 20)))
            group = Group(Request(prompt, 5, Sampling(), n=chance.randint(1, min(3, rows))), number)
            scheduler.waiting.append(group)
            arrived.append(group)
        for _ in range(2000):
            admitted += scheduler.admit()
            chunks = scheduler.chunks()
            if chunks:
                width = max(chunk.count for chunk in chunks)
                assert len(chunks) == 1 or width * len(chunks) <= scheduler.prefill_tokens
            for chunk in chunks:
                s = chunk.sequence
                cache[s.row][s.cached :] = s.ids[s.cached : s.cached + chunk.count]
                s.cached += chunk.count
            for chunk in chunks:
                if chunk.sequence.cached == len(chunk.sequence.ids):
                    apply(scheduler.start(chunk.sequence.group))
                    for member in chunk.sequence.group.members:
                        member.ids.append(chance.randrange(10**9))
            for s in list(scheduler.running()):
                cache[s.row][s.cached :] = [s.ids[-1]]
                s.cached += 1
                s.ids.append(chance.randrange(10**9))
            for row, s in enumerate(scheduler.rows):
                assert s is None or (s.row == row and cache[row][: s.cached] == s.ids[: s.cached])
                assert (row < scheduler.decoding) <= (s is not None)
            for group in scheduler.groups():
                if chance.random() < 0.2:
                    for member in group.members if chance.random() < 0.5 else group.members[:1]:
                        if member.row >= 0 and (group not in scheduler.reading or member is not group.members[0]):
                            apply(scheduler.leave(member))
                    if group in scheduler.reading:
                        for member in group.members:
                            apply(scheduler.leave(member))
            if not scheduler.waiting and not any(scheduler.rows):
                break
        assert admitted == arrived and scheduler.decoding == 0 and not scheduler.reading
