"""`sf image build`: requirements files, images that extend others, and what is told before anything is built."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sfparallel.errors import UsageError
from sfparallel.vmm import image
from sfparallel.vmm.guest_root import PipWanted
from sfparallel.vmm.requirements import Requirements, check_spec
from tests.test_image import cache, make_image  # noqa: F401 (a fixture)

Sf = Callable[..., subprocess.CompletedProcess[str]]


def _read(folder: Path, **files: str) -> Requirements:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    read = Requirements()
    read.read(folder / "main.txt")
    return read


def test_all_forms_that_pip_takes(tmp_path: Path) -> None:
    read = _read(
        tmp_path,
        main="# a comment\ntoolz==1.0.0 \\\n  --hash=sha256:00 \\\n  --hash=sha256:11\n-r more.txt\n-cpins.txt\n\n"
             "https://example.org/a-1-py3-none-any.whl#egg=a\nb @ git+https://example.org/b@v1\n--find-links wheels\n",
        more="tqdm >= 4 ; python_version < '4'  # why\n--requirement main.txt\n", pins="numpy < 2\n",
    )  # fmt: skip
    assert [" ".join(line.split()) for line in read.lines] == [
        "toolz==1.0.0 --hash=sha256:00 --hash=sha256:11", "tqdm >= 4 ; python_version < '4'",
        "https://example.org/a-1-py3-none-any.whl#egg=a", "b @ git+https://example.org/b@v1",
        f"--find-links {tmp_path / 'wheels'}",
    ]  # fmt: skip
    assert read.constraints == ["numpy < 2"]


@pytest.mark.parametrize("line", [
    "-e .", "--editable=../other", "--no-binary :all:", "./folder", "./gone.whl", "-r gone.txt", "-r",
])
def test_a_line_that_means_nothing_for_an_image_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"main.txt, line 3: "):
        _read(tmp_path, main=f"# first\ntoolz\n{line}\n")


def test_a_file_of_this_host_counts_by_its_content(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    wheel.write_bytes(b"first")
    before = _read(tmp_path, main=f"./{wheel.name}\n").lines
    wheel.write_bytes(b"second")
    assert before[0].startswith(str(wheel)) and _read(tmp_path, main=f"./{wheel.name}\n").lines != before


@pytest.mark.parametrize("spec", [
    "-r requirements.txt", "-rrequirements.txt", "--requirement=requirements.txt", "requirements.txt",
])
def test_a_requirements_file_as_a_package_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requirements.txt").write_text("toolz\n")
    with pytest.raises(UsageError) as caught:
        check_spec(spec)
    assert caught.value.hint is not None and "--requirements requirements.txt" in caught.value.hint


def test_what_pip_is_given(tmp_path: Path) -> None:
    words = PipWanted(["tqdm"], ["toolz", "-f /w"], ["numpy<2"]).words(tmp_path)
    assert words == ["-r", str(tmp_path / "requirements.txt"), "-c", str(tmp_path / "constraints.txt"), "--", "tqdm"]
    assert (tmp_path / "requirements.txt").read_text() == "toolz\n-f /w\n" and not PipWanted(constraints=["a<2"])


def test_a_recipe_over_another_has_both(cache: Path) -> None:  # noqa: F811
    make_image(cache)
    base = image.find().recipe
    new = image.Recipe("my-image", pip=("tqdm",), requirements=("toolz",)).over(base)
    assert (new.name, new.packages, new.pip, new.requirements) == ("my-image", ("less",), ("tqdm",), ("toolz",))
    assert image.Recipe("x").key("s") != image.Recipe("x", requirements=("toolz",)).key("s")
    assert image.replaced_by(new) is None and image.replaced_by(image.Recipe()) is not None
    assert image.replaced_by(image.Recipe().over(base)) is None


def test_images_whose_names_begin_alike(cache: Path) -> None:  # noqa: F811
    make_image(cache, "chem")
    other = make_image(cache, "chem-2")
    image.remove("chem")
    assert [found.name for found in image.list_images()] == ["chem-2"] and other.is_dir()


def test_hints_of_the_commands(cache: Path, sf: Sf, tmp_path: Path) -> None:  # noqa: F811
    gone = sf("image", "rm", "nope")
    assert gone.returncode == 70 and "sf image list" in gone.stderr and "build" not in gone.stderr
    assert "there is no guest image 'nope'" in sf("image", "build", "x", "--from", "nope").stderr
    wrong = sf("image", "build", "x", "--requirements", str(tmp_path / "none.txt"))
    assert wrong.returncode == 2 and "No such file" in wrong.stderr
    assert sf("image", "build", "x", "--pip", "-r x.txt").returncode == 2
