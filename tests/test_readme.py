"The front page can be followed as it stands"
import re

from conftest import ROOT

from simpledeco.study.models import model_folder


def snippets():
    "The blocks of Python on the front page, in order"
    blocks = re.findall(r'(?:^(?: {4}.*)?\n)+', (ROOT/'README.md').read_text(), re.M)
    return [re.sub('^ {4}', '', b, flags=re.M)
            for b in blocks if b.lstrip().startswith('from simpledeco')]


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    found = snippets()
    assert len(found) == 2
    code = '\n'.join(found).replace("'Qwen/Qwen2.5-0.5B-Instruct'",
                                    repr(str(model_folder('smoke', ROOT)))).replace('[::10]', '[::40]')
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(compile(code, 'README.md', 'exec'), made)
    assert (tmp_path/'heads/qwen/model.safetensors').exists() and made['head'].reads == 'hidden'


def test_every_link_of_the_front_page_leads_somewhere():
    links = re.findall(r'\]\(([^)#:]+)\)', (ROOT/'README.md').read_text())
    assert len(links) > 10
    for link in links: assert (ROOT/link).exists(), link
