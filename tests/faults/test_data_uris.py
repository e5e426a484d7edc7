"""Data behind a URI: keys and queries are refused, a listing that fails for a moment is made again."""

import faulty
import pytest
from small import tiny_config

from dfssd.config import Data
from dfssd.data.formats.listing import refuse_query
from dfssd.data.formats.read import read_source
from dfssd.data.formats.source import unlabelled_items
from dfssd.data.preparation.versions import listing_digest
from dfssd.errors import DfssdError
from dfssd.pipeline.data import content
from dfssd.runtime import retry

KEY = "s3://AKIAKEY:STOREPASS@bucket/data"
QUERY = "s3://bucket/data?region=eu-central-1&secret_key=STOREPASS"


@pytest.mark.parametrize("uri", [KEY, QUERY, "s3://bucket/data?region=eu"])
def test_keys_and_queries_would_reach_the_manifest_and_are_refused(tmp_path, uri):
    config = tiny_config(tmp_path)
    asked = [
        lambda: read_source(uri, "auto", ()),
        lambda: unlabelled_items(Data(unlabelled=(uri,))),
        lambda: content(config.model_copy(update={"data": Data(data=uri)})),
        lambda: content(config.model_copy(update={"data": Data(data="/x", unlabelled=(uri,))})),
    ]
    for ask in asked:
        with pytest.raises(DfssdError, match="neither keys nor a query") as caught:
            ask()
        assert "PASS" not in str(caught.value) and "AKIA" not in str(caught.value)
        assert "AWS_REGION" in caught.value.todo


def test_a_storage_that_fails_for_a_moment_is_told_of_without_its_key(monkeypatch, capsys):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "_failing", {})
    for uri in (KEY, QUERY):
        errors = [OSError(5, f"{uri}: no answer")]

        def call(errors=errors):
            if errors:
                raise errors.pop()
            return "read"

        assert retry.retried(call, "bucket/data") == "read"
    said = capsys.readouterr().out
    assert said.count("storage fails, will try again") == 2 and "PASS" not in said and "AKIA" not in said


def test_other_places_are_left_alone():
    for uri in ("s3://bucket/data", "/data/a?b@c", "file:///data/a@b", "gs://bucket/x@y", "data"):
        assert refuse_query(uri) == uri


def test_a_listing_that_fails_for_a_moment_is_made_again(strip, monkeypatch):
    uri = f"file://{strip}"
    wanted, digest = read_source(uri, "auto", ()), listing_digest([uri])
    rule, met = faulty.eio("get_file_info", "", times=3)
    faulty.install(monkeypatch, rule)
    assert [i.uri for i in read_source(uri, "auto", ()).items] == [i.uri for i in wanted.items]
    assert listing_digest([uri]) == digest and len(met) == 3
