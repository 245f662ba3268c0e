"""A file is judged alone and by its bytes, however it is cut; a refusal names its encoding."""

# ruff: noqa: RUF001

import gzip
import itertools
import subprocess
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kantai.errors import UserError
from kantai.preprocessing.documents import documents, pieces
from kantai.preprocessing.encodings import refuse_foreign_files
from kantai.preprocessing.files import MIB, find_files
from kantai.preprocessing.job import Job
from kantai.preprocessing.lines import Report
from kantai.preprocessing.merge import merge
from kantai.preprocessing.spans import Span
from kantai.preprocessing.tokenize import tokenize
from tests.helpers.commands import script
from tests.helpers.files import read_documents, write_file

ENGLISH = (
    "“It’s the law,” he said – and that was that. The moral law within me… isn’t it strange?\n"
)
GERMAN = "Die Kritik ist ein Buch über die Möglichkeit der Erkenntnis und gehört zu den größten.\n"
SAMPLES = {
    "CP1252": ENGLISH,
    "CP1251": "Критика чистого разума — главное произведение Канта, написанное в Кёнигсберге.\n",
    "KOI8-R": "Критика чистого разума главное произведение Канта, написанное в городе.\n",
    "CP1250": "Krytyka czystego rozumu to książka, którą napisał Kant; źródło wiedzy jest ważne.\n",
    "GB18030": "纯粹理性批判是康德的主要著作，写于柯尼斯堡。人类的知识从经验开始。\n",
    "BIG5": "純粹理性批判是康德的主要著作，寫於柯尼斯堡。人類的知識從經驗開始。\n",
    "CP932": "純粋理性批判はカントの主要な著作であり、私たちの認識は経験から始まる。\n",
    "EUC-JP": "純粋理性批判はカントの主要な著作であり、私たちの認識は経験から始まる。\n",
    "CP949": "순수이성비판은 칸트의 주요 저작이며 도시에서 쓰였다. 인식은 경험에서 시작한다.\n",
    "CP1256": "نقد العقل المحض هو الكتاب الرئيسي للفيلسوف كانط وقد كتبه في المدينة.\n",
    "UTF-16LE": "Die Kritik der reinen Vernunft ist ein Buch über die Möglichkeit.\n",
    "UTF-16BE": "纯粹理性批判是康德的主要著作，写于柯尼斯堡。\n",
}


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
def test_stray_byte_in_one_of_forty_books_is_repaired_and_counted(
    tmp_path: Path, unit: str
) -> None:
    for number in range(40):
        write_file(tmp_path / f"{number:02d}.txt", "A sentence of a book.\n" * 500)
    path = tmp_path / "17.txt"
    path.write_bytes(path.read_bytes().replace(b"sentence", b"sent\xe9nce", 1))
    report = Report()
    texts = list(read_documents([tmp_path], unit, report=report))  # type: ignore[arg-type]
    assert sum(text.count("\ufffd") for text in texts) == report.invalid_utf8 == 1
    assert report.first["invalid_utf8"] == f"{path} line 1"


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252", "gb18030"])
def test_one_file_of_another_encoding_among_fifty_is_refused(
    tmp_path: Path, encoding: str, unit: str
) -> None:
    for number in range(50):
        write_file(tmp_path / f"{number:02d}.txt", "A sentence of a book.\n" * 500)
    text = SAMPLES["GB18030"] if encoding == "gb18030" else ENGLISH
    path = write_file(tmp_path / "17.txt", (text * 20).encode(encoding))
    with pytest.raises(UserError, match=f"^{path} line 1 .*iconv -f [^ ]+ -t UTF-8 {path} > NEW"):
        list(read_documents([tmp_path], unit))  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", SAMPLES)
def test_advice_names_the_encoding_and_gives_the_text_back(tmp_path: Path, encoding: str) -> None:
    text = SAMPLES[encoding] * 20
    path = write_file(tmp_path / "a file.txt", text.encode(encoding))
    with pytest.raises(UserError, match="it seems to be") as error:
        list(read_documents([path]))
    command = str(error.value).partition("as with ")[2].removesuffix(" > NEW")
    converted = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
    assert converted.decode() == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_byte_order_mark_of_another_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    name = "UTF-32" if encoding == "utf-32" else "UTF-16"
    for suffix, text in ((".txt", "one\n"), (".jsonl", '{"text": "one"}\n'), (".csv", "text\na\n")):
        path = write_file(tmp_path / f"a{suffix}", mark + text.encode(encoding))
        with pytest.raises(UserError, match=rf"{path} line 1 is not UTF-8, but {name} .*iconv"):
            list(read_documents([path]))


def test_spoiled_file_of_every_format_is_refused_with_advice(tmp_path: Path) -> None:
    bad = GERMAN.encode("cp1252")
    write_file(tmp_path / "a.txt.gz", gzip.compress(bad * 99))
    record = b'{"text": "' + bad.strip() + b'"}\n'
    write_file(tmp_path / "b.jsonl", record * 99)
    write_file(tmp_path / "c.csv", b"text\n" + bad * 99)
    column = pa.array([bad] * 99, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    for name, advice in (
        ("a.txt.gz", r"line 1 .*unpack it and convert it, as with iconv -f CP1252 -t UTF-8"),
        ("b.jsonl", r"line 1 .*iconv -f CP1252 -t UTF-8 .*b\.jsonl > NEW"),
        ("c.csv", r"line 2 .*iconv -f CP1252 -t UTF-8 .*c\.csv > NEW"),
        ("d.parquet", r"record 1 .*write it again from text that was decoded as ENCODING"),
    ):
        with pytest.raises(UserError, match=rf"{name} {advice}"):
            list(read_documents([tmp_path / name]))


def test_few_spoiled_characters_beside_many_valid_ones_are_repaired(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", GERMAN.encode() * 900 + GERMAN.encode("cp1252") * 100)
    assert len(list(read_documents([path]))) == 1000
    path = write_file(tmp_path / "b.txt", b"plain text\n" * 9000 + GERMAN.encode("cp1252") * 5)
    with pytest.raises(UserError, match="is not UTF-8"):
        list(read_documents([path]))


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([b"plain words\n", "Käse\n".encode(), b"K\xe4se\n"]), max_size=60),
    st.lists(st.integers(1, 600), max_size=5),
)
def test_verdict_is_that_of_the_whole_file_however_it_is_cut(
    lines: list[bytes], cuts: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (file,) = find_files([str(write_file(Path(folder) / "a.txt", b"".join(lines) or b" "))])
        report = Report()
        edges = sorted({0, *(cut for cut in cuts if cut < file.size), file.size})
        verdicts = []
        for spans in ([Span(file, 0, file.size)], itertools.starmap(Span, _pairs(file, edges))):
            try:
                for span in spans:
                    list(documents((span,), "line", report=report))
                refuse_foreign_files([file], report.tallies)
                verdicts.append("accepted")
            except UserError as error:
                verdicts.append(str(error).partition("as ")[2])
        assert verdicts[0] == verdicts[1]


def _pairs(file: object, edges: list[int]) -> list[tuple[object, int, int]]:
    return [(file, start, stop) for start, stop in itertools.pairwise(edges)]


def test_cut_file_of_another_encoding_is_refused_when_its_pieces_are_merged(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    """No piece knows the whole file: the first is plain ASCII."""
    text = b"plain words and more of them\n" * 2000 + GERMAN.encode("cp1252") * 100
    path = write_file(tmp_path / "a.txt", text)
    for piece_bytes in (10_000, 30_000):
        cut = pieces(find_files([str(path)]), "line", piece_bytes)
        assert len(cut) > 1
        job = Job(cut, "line", "text", tokenizer_dir, tmp_path / "new", {})
        tokenize(job, processes=1)
        with pytest.raises(UserError, match="500 characters in 66,700 bytes") as error:
            merge(job)
        assert "it seems to be CP1252: convert it first" in str(error.value)
        assert not job.output.exists()


def test_stray_bytes_of_a_cut_file_are_repaired(tmp_path: Path, tokenizer_dir: Path) -> None:
    lines = [b"plain words %d\n" % number for number in range(3000)]
    path = write_file(tmp_path / "a.txt", b"".join([*lines[:2000], b"K\xe4se\n", *lines[2000:]]))
    cut = pieces(find_files([str(path)]), "line", 10_000)
    job = Job(cut, "line", "text", tokenizer_dir, tmp_path / "new", {})
    tokenize(job, processes=1)
    report = merge(job)["report"]
    assert report["invalid_utf8"] == 1
    assert "tallies" not in report


def test_large_file_is_refused_by_its_beginning(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt", GERMAN.encode("cp1252") * (5 * MIB // len(GERMAN)))
    (file,) = find_files([str(path)])
    with pytest.raises(UserError, match=r"a\.txt in its first MiB is not UTF-8, .*iconv -f CP1252"):
        next(documents((Span(file, 0, 1000),), "line"))


def test_tokenizer_is_not_trained_on_text_of_another_encoding(tmp_path: Path) -> None:
    text = b"plain words and more of them\n" * 2000 + GERMAN.encode("cp1252") * 400
    path = write_file(tmp_path / "a.txt", text)
    done = script("train_tokenizer", "--input", path, "--output", tmp_path / "new")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path} line 2001 is not UTF-8")
    assert "iconv -f CP1252 -t UTF-8" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "CP932", "BIG5"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_records_that_cannot_be_parsed_for_their_encoding_are_refused_for_it(
    tmp_path: Path, encoding: str, name: str
) -> None:
    """In some encodings, a character may end in a byte that is a backslash elsewhere."""
    texts = ["表示する能力と表現、ソースの一覧。" * 3, "功能許蓋育。" * 3, "plain words"]
    text = SAMPLES[encoding].strip() if encoding.startswith("UTF") else texts[encoding == "BIG5"]
    record = f'{{"text": "{text}"}}\n' if name == "a.jsonl" else f'"{text}"\n'
    begin = "text\n" if name == "a.csv" else ""
    path = write_file(tmp_path / name, (begin + record * 50).encode(encoding))
    with pytest.raises(UserError, match=f"it seems to be {encoding}: convert it first"):
        list(read_documents([path]))
