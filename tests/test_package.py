"What is uploaded: wheel and sdist"
import sys, tarfile, zipfile

from conftest import ROOT, run


def test_wheel_and_sdist(clone, tmp_path):
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, cwd=clone)
    (wheel,), (sdist,) = tmp_path.glob('*.whl'), tmp_path.glob('*.tar.gz')
    run(sys.executable, '-m', 'twine', 'check', '--strict', wheel, sdist, cwd=tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {n for n in names if n.startswith('simpledeco/')} == {f'simpledeco/{p.name}' for p in (ROOT/'simpledeco').glob('*.py')}
    points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
    for line in ('simpledeco = simpledeco.cli:main', 'simpledeco = simpledeco.vllm:register', 'simpledeco = simpledeco.harness:SimpleDecoLM'): assert line in points
    assert any(n.endswith('simpledeco/loss.py') for n in tarfile.open(sdist).getnames())
