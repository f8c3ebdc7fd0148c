"""What tests say about findings of `samloop doctor`."""


def told(findings, status=None):
    return [f"{f.check}: {f.text}" for f in findings if status is None or f.status == status]


def only(findings, status, *words):
    """The one finding of a status, which says all the words, and names a remedy."""
    found = [f for f in findings if f.status == status]
    assert len(found) == 1, findings
    for word in words:
        assert word in f"{found[0].check}: {found[0].text}", found
    assert found[0].remedy or status == "ok"
    return found[0]
