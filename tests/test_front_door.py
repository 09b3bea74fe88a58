from typer.testing import CliRunner

from edgefusion import app


def test_doctor_names_what_is_installed() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "torch" in result.output and "memory" in result.output


def test_doctor_names_what_is_missing_and_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr("edgefusion._NEEDED", ["a-package-that-nobody-has"])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "pip install a-package-that-nobody-has" in result.output


def test_an_unknown_zoo_model_is_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["zoo", "build", "unet", "--steps", "1"])
    assert result.exit_code == 2
    assert "'unet'" in result.output and "teacher" in result.output
