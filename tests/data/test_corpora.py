"""Where text is found, how it is split, and that it is tokenised once."""

import hashlib
import io
import json
import logging
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import yaml

from relax.data import corpora
from relax.data.corpora import DataConfig, load_corpus, read_texts

CONF = Path(__file__).parents[2] / "conf" / "data"
PAYLOAD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


class ByteTokenizer:
    """One token per UTF-8 byte; the specials follow the 256 bytes."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    fingerprint = "bytes"

    def __init__(self):
        self.encoded = []

    def encode(self, text):
        self.encoded.append(text)
        return list(text.encode())


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """Keeps the user's environment, cache and network out of every test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    monkeypatch.delenv("RELAX_DATA_DIR", raising=False)
    monkeypatch.setattr(
        platformdirs, "user_cache_path", lambda name: tmp_path / "user" / name
    )
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "user" / "relax"


def config_of(name, **changes):
    return DataConfig(**yaml.safe_load((CONF / f"{name}.yaml").read_text()) | changes)


def text_config(path, **changes):
    return config_of("text", path=str(path), **changes)


def serve(monkeypatch, payload, error=None):
    """Makes urlopen answer with a payload or an error; returns the calls it had."""
    calls = []

    def urlopen(url, timeout):
        calls.append((url, timeout))
        if error:
            raise error
        response = io.BytesIO(payload)
        response.headers = {"Content-Length": str(len(payload))}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return calls


def shakespeare_config(**changes):
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    return config_of("shakespeare", sha256=digest, **changes)


def test_the_yaml_files_hold_every_field():
    config = config_of("shakespeare")
    assert (config.validation_fraction, config.text_field) == (0.1, "text")
    assert config.sha256.startswith("86c4e6aa")
    assert text_config("a.txt").download is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "shakespear"}, r"data\.kind=shakespear: choose one of shakespeare"),
        ({"kind": "text"}, r"data\.path=null, but data\.kind=text"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0"),
        ({"validation_fraction": -0.1}, r"data\.validation_fraction=-0\.1"),
        ({"sha256": None}, r"data\.download=true needs .*data\.sha256 \(now None\)"),
    ],
)
def test_mistakes_in_the_configuration_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("shakespeare", **changes)


def test_shakespeare_is_looked_for_in_order(tmp_path, cache, monkeypatch, caplog):
    """Path, data folder, cache, download: each is taken only if the earlier lack."""
    caplog.set_level(logging.INFO)
    calls = serve(monkeypatch, PAYLOAD)
    named, folder = tmp_path / "named.txt", tmp_path / "folder"
    folder.mkdir()
    cache.mkdir(parents=True)
    monkeypatch.setenv("RELAX_DATA_DIR", str(folder))
    name = "tinyshakespeare.txt"
    places = [named, folder / name, cache / name]
    for place in places:
        place.write_text(f"from {place.name} of {place.parent.name}")

    by_name = shakespeare_config(path=str(named))
    assert read_texts(by_name) == (["from named.txt of " + tmp_path.name], str(named))
    config = shakespeare_config()
    for place in places[1:]:
        assert read_texts(config) == ([place.read_text()], str(place))
        assert str(place) in caplog.records[-1].message
        place.unlink()
    assert calls == []
    assert read_texts(config) == ([PAYLOAD.decode()], config.url)
    assert calls == [(config.url, 10)]
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_a_download_is_kept(cache, monkeypatch):
    calls = serve(monkeypatch, PAYLOAD)
    config = shakespeare_config()
    read_texts(config)
    documents, source = read_texts(config)
    assert documents == [PAYLOAD.decode()]
    assert source == str(cache / "tinyshakespeare.txt")
    assert len(calls) == 1
    assert [file.name for file in cache.iterdir()] == ["tinyshakespeare.txt"]


@pytest.mark.parametrize(
    ("payload", "error", "reason"),
    [
        (PAYLOAD + b"x", None, "discarded, its sha256 is"),
        (b"", urllib.error.URLError("no route"), "could not be downloaded"),
        (b"", TimeoutError("timed out"), "could not be downloaded"),
    ],
)
def test_a_failed_download_leaves_the_excerpt_and_two_warnings(
    payload, error, reason, cache, monkeypatch, caplog
):
    serve(monkeypatch, payload, error)
    documents, source = read_texts(shakespeare_config())
    assert source == "bundled excerpt"
    assert len(documents) == 1
    assert len(documents[0]) > 1000
    first, second = caplog.records
    assert (first.levelname, second.levelname) == ("WARNING", "WARNING")
    assert reason in first.message
    assert "recalled text, not for quality figures" in second.message
    assert not cache.exists()


def test_without_download_the_network_is_left_alone(caplog):
    assert read_texts(shakespeare_config(download=False))[1] == "bundled excerpt"
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", ["shakespeare", "text"])
def test_a_missing_path_is_an_error(kind, tmp_path):
    config = config_of(kind, path=str(tmp_path / "absent.txt"))
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*absent\.txt names no"):
        read_texts(config)


@pytest.fixture
def library(tmp_path):
    """A folder of three texts, two lines of JSON and a file that is neither."""
    root = tmp_path / "library"
    (root / "b").mkdir(parents=True)
    (root / "z.txt").write_text("last")
    (root / "a.txt").write_bytes("naïve\r\n".encode())
    (root / "b" / "deep.txt").write_text("deep")
    lines = [json.dumps({"text": text, "url": "u"}) for text in ("one", "two\u2028")]
    (root / "b" / "rows.jsonl").write_text("\n\n".join(lines) + "\n")
    (root / "notes.md").write_text("no")
    return root


def test_a_folder_is_read_in_order(library):
    documents, source = read_texts(text_config(library))
    assert documents == ["naïve\r\n", "deep", "one", "two\u2028", "last"]
    assert source == str(library)


def test_a_glob_and_a_file_take_what_they_name(library):
    assert read_texts(text_config(library / "*.txt"))[0] == ["naïve\r\n", "last"]
    assert read_texts(text_config(library / "**" / "d*"))[0] == ["deep"]
    assert read_texts(text_config(library / "notes.md"))[0] == ["no"]
    (library / "odd[1].txt").write_text("odd")
    assert read_texts(text_config(library / "odd[1].txt"))[0] == ["odd"]


def test_unescaped_line_separators_do_not_end_a_json_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a\u2028b"}\r\n{"text": "c"}', encoding="utf-8")
    assert read_texts(text_config(file))[0] == ["a\u2028b", "c"]


def test_another_text_field(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"body": "x"}')
    assert read_texts(text_config(file, text_field="body"))[0] == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ('{"body": "a", "id": 3}', r"no field data\.text_field=text .*body, id"),
        ('["a"]', r"no field data\.text_field=text .*no object"),
        ('{"text": 3}', r"data\.text_field=text holds int, not a string"),
        ('{"text": null}', r"data\.text_field=text holds NoneType"),
    ],
)
def test_a_bad_json_line_is_named(line, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: .*" + message):
        read_texts(text_config(file))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        read_texts(text_config(tmp_path / "latin.txt"))


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"data\.path=.*the text of .* is empty"):
        read_texts(text_config(tmp_path / "empty.txt"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("no")
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*folder names no file"):
        read_texts(text_config(tmp_path / "folder"))


def test_one_document_is_cut_by_characters(tmp_path):
    """Ten characters, one of two bytes: seven to train, three to validation."""
    (tmp_path / "t.txt").write_text("abcdefé789", encoding="utf-8")
    config = text_config(tmp_path / "t.txt", validation_fraction=0.25)
    corpus = load_corpus(config, ByteTokenizer())
    assert bytes(corpus.train.tolist()).decode() == "abcdefé"
    assert bytes(corpus.validation.tolist()).decode() == "789"
    assert corpus.source == str(tmp_path / "t.txt")


def test_many_documents_are_cut_as_one_with_eos_between(tmp_path):
    """Of 16 characters 8 are validation: the cut falls into the second document."""
    for name, text in {"a": "abcde", "b": "fghij", "c": "", "d": "klmnop"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = text_config(tmp_path, validation_fraction=0.5)
    corpus = load_corpus(config, ByteTokenizer())
    eos = [257]
    assert corpus.train.tolist() == [*b"abcde", *eos, *b"fgh"]
    assert corpus.validation.tolist() == [*b"ij", *eos, *b"klmnop"]


def test_a_tokenizer_without_eos_joins_documents_bare(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}')
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = None
    config = text_config(tmp_path / "t.jsonl", validation_fraction=0.0)
    corpus = load_corpus(config, tokenizer)
    assert corpus.train.tolist() == [*b"abcd"]
    assert len(corpus.validation) == 0


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)]
)
def test_ids_take_two_bytes_where_they_fit(vocab_size, dtype, tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghijk")
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    corpus = load_corpus(text_config(tmp_path / "t.txt"), tokenizer)
    assert corpus.train.dtype == corpus.validation.dtype == dtype
    assert isinstance(corpus.train, np.memmap)
    assert not corpus.train.flags.writeable


def test_long_documents_are_cut_after_newlines(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_PIECE", 7)
    (tmp_path / "t.txt").write_text("ab\ncdefg\nhi\njklm\nnopqrstuvwxyz")
    tokenizer = ByteTokenizer()
    config = text_config(tmp_path / "t.txt", validation_fraction=0.0)
    corpus = load_corpus(config, tokenizer)
    assert tokenizer.encoded == ["ab\ncdefg\n", "hi\njklm\n", "nopqrstuvwxyz"]
    assert corpus.train.tolist() == [*b"ab\ncdefg\nhi\njklm\nnopqrstuvwxyz"]


def test_tiny_shakespeare_has_nanogpts_split(data_dir, tmp_path):
    path = data_dir / "tinyshakespeare.txt"
    config = config_of("shakespeare", path=str(path), cache_dir=str(tmp_path))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == config.sha256
    assert len(read_texts(config)[0][0]) == 1_115_394
    tokenizer = ByteTokenizer()
    corpus = load_corpus(config, tokenizer)
    assert len(corpus.train) == 1_003_854
    assert len(corpus.validation) == 111_540
    assert len(tokenizer.encoded) == 2  # each split is short enough to stay whole
    assert bytes(corpus.train[:14].tolist()) == b"First Citizen:"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghijk")
    return text_config(tmp_path / "t.txt", cache_dir=str(tmp_path / "cache"))


def cached_files(config):
    return sorted(p for p in Path(config.cache_dir).rglob("*") if p.is_file())


def test_a_corpus_is_tokenised_once(config):
    first, second = ByteTokenizer(), ByteTokenizer()
    corpus = load_corpus(config, first)
    again = load_corpus(config, second)
    assert first.encoded == ["abcdefghi", "jk"]
    assert second.encoded == []
    assert again.train.tolist() == corpus.train.tolist() == [*b"abcdefghi"]
    train, validation = cached_files(config)
    assert (train.name, validation.name) == ("train.npy", "validation.npy")
    assert train.parent.parent == Path(config.cache_dir) / "tokens"


@pytest.mark.parametrize("changed", ["text", "documents", "fraction", "tokenizer"])
def test_the_cache_is_keyed_by_what_the_tokens_depend_on(changed, config, tmp_path):
    load_corpus(config, ByteTokenizer())
    tokenizer = ByteTokenizer()
    if changed == "text":
        (tmp_path / "t.txt").write_text("abcdefghijK")
    elif changed == "documents":
        (tmp_path / "t.jsonl").write_text('{"text": "abcdef"}\n{"text": "ghijk"}')
        config = text_config(tmp_path / "t.jsonl", cache_dir=config.cache_dir)
    elif changed == "fraction":
        config = text_config(
            tmp_path / "t.txt", cache_dir=config.cache_dir, validation_fraction=0.5
        )
    else:
        tokenizer.fingerprint = "other bytes"
    load_corpus(config, tokenizer)
    assert tokenizer.encoded != []
    assert len(cached_files(config)) == 4


def test_two_writers_at_once_leave_one_whole_corpus(config):
    """Both are held inside encode until the other is there too."""
    barrier = threading.Barrier(2, timeout=30)

    class Waiting(ByteTokenizer):
        def encode(self, text):
            if text == "abcdefghi":
                barrier.wait()
            return super().encode(text)

    with ThreadPoolExecutor(2) as pool:
        pair = list(pool.map(lambda _: load_corpus(config, Waiting()), range(2)))
    for corpus in pair:
        assert corpus.train.tolist() == [*b"abcdefghi"]
        assert corpus.validation.tolist() == [*b"jk"]
    names = [file.name for file in cached_files(config)]
    assert names == ["train.npy", "validation.npy"]


def test_a_write_that_breaks_off_leaves_nothing(config, monkeypatch):
    def break_off(file, tokens):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpora.np, "save", break_off)
    with pytest.raises(ValueError, match=r"data\.cache_dir cannot take .*No space"):
        load_corpus(config, ByteTokenizer())
    assert cached_files(config) == []


def test_an_unwritable_cache_folder_is_named(tmp_path):
    (tmp_path / "t.txt").write_text("abcdefghijk")
    blocked = text_config(tmp_path / "t.txt", cache_dir=str(tmp_path / "t.txt"))
    with pytest.raises(ValueError, match=r"data\.cache_dir cannot take .*t\.txt"):
        load_corpus(blocked, ByteTokenizer())
