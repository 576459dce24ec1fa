"""The same sources over HTTP, S3 and fsspec's memory, with servers on this machine, some of which fail."""

import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_core.errors import ConfigError, DataError, UnreachableError
from pipelines.data.sources import ImageFolder, Item, Parquet, Source, Tars, files
from tests.pipelines import servers
from tests.pipelines.source_folders import read

FLAKY = 2  # answers of 503 before the right one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as class folders, beside metadata, in tars and in Parquet."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(30):
        name = f"{'cat' if number % 2 else 'dög #1'}/{number:02d} 100%.png"
        (root / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "classes" / name).write_bytes(b"picture %d" % number * number)
        rows.append({"file_name": name, "text": f"number {number} \N{CAT FACE}", "label": number % 2})
    (root / "classes/.hidden.png").write_bytes(b"hidden")
    named = root / "named"
    named.mkdir()
    for row in rows:
        (named / row["file_name"]).parent.mkdir(exist_ok=True)
        (named / row["file_name"]).write_bytes((root / "classes" / row["file_name"]).read_bytes())
    (named / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tars").mkdir()
    for first in (0, 15):
        with tarfile.open(root / f"tars/set-{first // 15}.tar", "w") as tar:
            for number in range(first, first + 15):
                info = tarfile.TarInfo(f"{number:02d}.png")
                info.size = len(data := b"picture %d" % number)
                tar.addfile(info, io.BytesIO(data))
    table = pa.table({"image": [b"picture %d" % number * 100 for number in range(300)], "label": [0, 1, 2] * 100})
    (root / "tables").mkdir()
    pq.write_table(table, root / "tables/a.parquet", row_group_size=100, compression="none")
    return root


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[str]:
    """A bucket with all of it; gives its URL."""
    with pytest.MonkeyPatch.context() as patch, servers.s3() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("pictures")
        for path in folder.rglob("*"):
            if path.is_file():
                bucket.pipe(f"pictures/{path.relative_to(folder)}", path.read_bytes())
        yield "s3://pictures"
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[str]:
    with servers.web(folder) as url:
        yield url


@pytest.fixture(scope="module")
def ranges(folder: Path) -> Iterator[str]:
    with servers.web(folder, servers.Ranges) as url:
        yield url


@pytest.fixture(scope="module")
def memory(folder: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/pictures", recursive=True)
    yield "memory://pictures"
    store.rm("/pictures", recursive=True)


@pytest.fixture
def base(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience, so that a test of it is short."""
    monkeypatch.setattr(files, "SILENCE", 0.2)
    monkeypatch.setattr(files, "PAUSE", 0.01)


@pytest.mark.parametrize("base", ["s3", "memory"], indirect=True)
@pytest.mark.parametrize("end", ["", "/"])
def test_class_folders_of_an_object_store_are_those_on_disk(folder: Path, base: str, end: str, tmp_path: Path) -> None:
    wanted = read(ImageFolder(str(folder / "classes")), tmp_path)
    assert len(wanted) == 30
    assert read(ImageFolder(f"{base}/classes{end}"), tmp_path) == wanted


@pytest.mark.parametrize("base", ["s3", "memory", "http", "ranges"], indirect=True)
def test_a_folder_with_metadata_is_that_on_disk(folder: Path, base: str, tmp_path: Path) -> None:
    wanted = read(ImageFolder(str(folder / "named")), tmp_path)
    assert wanted[0].data == b""
    assert not any(item.fault for item in wanted)
    assert read(ImageFolder(f"{base}/named"), tmp_path) == wanted


@pytest.mark.parametrize("base", ["s3", "memory", "http", "ranges"], indirect=True)
def test_tars_are_those_on_disk(folder: Path, base: str, tmp_path: Path) -> None:
    wanted = read(Tars(str(folder / "tars")), tmp_path)
    assert len(wanted) == 30
    assert read(Tars(f"{base}/tars/set-{{0,1}}.tar"), tmp_path) == wanted
    sizes = [path.stat().st_size for path in sorted((folder / "tars").iterdir())]
    assert [part.weight for part in Tars(f"{base}/tars/set-{{0..1}}.tar").catalog(tmp_path).parts] == sizes


@pytest.mark.parametrize("base", ["s3", "memory"], indirect=True)
def test_a_pattern_is_listed_where_there_is_a_list(folder: Path, base: str, tmp_path: Path) -> None:
    wanted = read(Tars(str(folder / "tars")), tmp_path)
    assert read(Tars(f"{base}/tars/*.tar"), tmp_path) == wanted
    assert read(Tars(f"{base}/tars"), tmp_path) == wanted


@pytest.mark.parametrize("base", ["s3", "memory", "http", "ranges"], indirect=True)
def test_parquet_is_that_on_disk(folder: Path, base: str, tmp_path: Path) -> None:
    wanted = read(Parquet(str(folder / "tables/a.parquet")), tmp_path)
    assert len(wanted) == 300
    assert read(Parquet(f"{base}/tables/a.parquet"), tmp_path) == wanted


def test_without_ranges_a_table_is_one_part(http: str, ranges: str, tmp_path: Path) -> None:
    weights = [
        [part.weight for part in Parquet(f"{url}/tables/a.parquet").catalog(tmp_path).parts] for url in (http, ranges)
    ]
    assert weights == [[300], [100, 100, 100]]


def test_the_listing_of_s3_goes_over_pages(s3: str, tmp_path: Path) -> None:
    names = [f"many/{number % 2}/{number:04d}.png" for number in range(1100)]  # a page has a thousand
    fsspec.filesystem("s3").pipe({f"pictures/{name}": b"x" for name in names})
    catalog = ImageFolder(f"{s3}/many").catalog(tmp_path)
    assert catalog.pictures == 1100
    parts = list(catalog.parts)
    assert [part.weight for part in parts] == [512, 512, 76]
    listed = [name for part in parts for name, _ in part.where]
    assert listed == sorted(name.removeprefix("many/") for name in names)


def test_what_s3_does_not_hold_is_refused(s3: str, tmp_path: Path) -> None:
    for source in (ImageFolder(f"{s3}/none"), ImageFolder("s3://no-such-bucket/x"), Tars(f"{s3}/none.tar")):
        with pytest.raises(DataError, match="none|no-such-bucket"):
            source.catalog(tmp_path)


@pytest.mark.parametrize("base", ["s3", "memory", "http"], indirect=True)
def test_faults_and_limits_hold_for_single_pictures(folder: Path, base: str, tmp_path: Path) -> None:
    source = ImageFolder(f"{base}/named", max_bytes=60)
    (part,) = source.catalog(tmp_path).parts
    rows = [["missing.png", [None] * 5], *part.where]
    missing, *items = source.items(part._replace(where=rows))
    assert missing.fault == ("unreadable", "missing.png is missing")
    sizes = [(folder / "named" / name).stat().st_size for name, _ in part.where]
    assert [item.fault and item.fault[0] for item in items] == [None if n <= 60 else "too_large" for n in sizes]
    assert {None, "too_large"} == {item.fault and item.fault[0] for item in items}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (lambda url: ImageFolder(f"{url}/classes"), "metadata.jsonl"),
        (lambda url: Tars(f"{url}/tars/*.tar"), "cannot be listed over HTTP"),
        (lambda url: Tars(f"{url}/tars/none.tar"), "none.tar is missing"),
        (lambda url: Parquet(f"{url}/none.parquet"), "none.parquet is missing"),
    ],
)
def test_over_http_nothing_is_listed_and_what_is_missing_is_said(
    http: str, tmp_path: Path, source, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        source(http).catalog(tmp_path)


@pytest.mark.parametrize(
    ("status", "kind"), [(403, None), (404, None), (410, None), (429, "busy"), (500, "busy"), (503, "busy")]
)
@pytest.mark.usefixtures("hasty")
def test_an_answer_about_one_picture_is_a_fault_and_a_server_in_trouble_stops(
    tmp_path: Path, status: int, kind: str | None
) -> None:
    rows = [{"file_name": f"{status}/a.png"}, {"file_name": "b.png"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.png").write_bytes(b"b")
    with servers.web(tmp_path, servers.Failing) as url:
        source = ImageFolder(url)
        (part,) = source.catalog(tmp_path / "spool").parts
        if kind == "busy":
            with pytest.raises(UnreachableError, match=f"{status}/a.png.*HTTP {status}"):
                list(source.items(part))
        else:
            bad, good = source.items(part)
            assert bad.fault is not None
            assert bad.fault[0] == "unreadable"
            assert good == Item("b.png", b"b")


@pytest.mark.usefixtures("hasty")
def test_a_server_that_fails_for_a_moment_is_asked_again(tmp_path: Path) -> None:
    failures = iter([True] * FLAKY + [False] * 100)

    class Flaky(servers.Quiet):
        def do_GET(self) -> None:
            if self.path == "/a.png" and next(failures):
                self.send_error(503)
            else:
                super().do_GET()

    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    (tmp_path / "a.png").write_bytes(b"a")
    with servers.web(tmp_path, Flaky) as url:
        assert read(ImageFolder(url), tmp_path / "spool") == [Item("a.png", b"a")]


@pytest.mark.usefixtures("hasty")
def test_a_body_that_ends_early_is_no_picture(tmp_path: Path) -> None:
    class Short(servers.Quiet):
        def do_GET(self) -> None:
            if self.path != "/a.png":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
            return None

    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with servers.web(tmp_path, Short) as url, pytest.raises(UnreachableError, match="a.png"):
        read(ImageFolder(url), tmp_path / "spool")


@pytest.mark.parametrize("make", [ImageFolder, Tars, Parquet])
@pytest.mark.usefixtures("hasty")
def test_a_server_that_says_nothing_or_is_not_there_is_a_sentence(tmp_path: Path, make: type[Source]) -> None:
    for place in (servers.silent(), servers.closed()):
        with place as url, pytest.raises(UnreachableError, match=r"127\.0\.0\.1"):
            make(f"{url}/x.tar").catalog(tmp_path)


@pytest.mark.usefixtures("hasty")
def test_a_server_that_drips_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SLOWEST", 0.05)

    class Dripping(servers.Quiet):
        def do_GET(self) -> None:
            if self.path != "/a.png":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
            return None

    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with servers.web(tmp_path, Dripping) as url, pytest.raises(UnreachableError, match=r"a\.png.*in time"):
        read(ImageFolder(url), tmp_path / "spool")


@pytest.mark.parametrize("server", [servers.closed, servers.silent])
@pytest.mark.usefixtures("hasty")
def test_an_s3_that_is_not_there_or_says_nothing_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Callable[[], AbstractContextManager[str]]
) -> None:
    with server() as url:
        for name, value in (servers.ENVIRONMENT | {"AWS_ENDPOINT_URL": url}).items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(UnreachableError, match="s3://bucket/x"):
            ImageFolder("s3://bucket/x").catalog(tmp_path)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_scheme_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        ImageFolder("gs://bucket/x").catalog(tmp_path)
