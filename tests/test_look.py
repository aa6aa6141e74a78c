"The page that `inspect` writes, in a real browser: the same numbers as in Python, with a keyboard, on a phone, in the dark"
import html, random, re
from functools import cache
from types import SimpleNamespace

import pytest, torch
from browser import Browser
from conftest import ROOT
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from simpledeco.head import TemperatureHead
from simpledeco.look import MOST, TokenView, added_text, heat, token_page, token_report
from simpledeco.model import load_model, sizes

ASK, SAID, BESIDE = 'What is <b>1</b> + 1?', 'It is 2, as 🌧 in Łódź.', 'It is three.'
HOSTILE = '</script><script>boom()</script><img src=x onerror=boom()> "q" \'s\' &lt; <!-- \u202eevil\u200f שלום 👩‍🚀 ' + 'x'*300
TOKENS = "[...document.querySelectorAll('.sd-t')]"
ACTIVE = f"{TOKENS}.indexOf(document.activeElement)"
OPEN = "!document.getElementById('sd-box').hidden"


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp('chromium'))
    yield chromium
    chromium.close()


def reader(name):
    "Reports on answers of a model, by a head that is the warmer the less the model is sure"
    model, tokenizer = load_model(ROOT/'models'/name)
    @cache
    def report(said, ask=ASK, min_p=.1, **kw):
        head = TemperatureHead(sizes(model)[0], width=0, min_p=min_p)
        with torch.no_grad():
            head.net[0].weight.zero_()[0, 0] = .3 # of the entropy
            head.net[0].bias.fill_(.05)
        return token_report(model, tokenizer, head, [dict(role='user', content=ask), dict(role='assistant', content=said)], **kw)
    return report


@pytest.fixture(scope='module')
def report(): return reader('embedded')


@pytest.fixture
def write(report, tmp_path):
    "Writes a page with two answers: its address"
    def page(prompt=ASK, said=SAID, beside=BESIDE, scale=1.):
        both = dict(head=report(said, scale=scale), static=report(beside, scale=scale, temperature=1.2))
        (tmp_path/'page.html').write_text(token_page(both, prompt, 'SmolLM2', .1, scale), encoding='utf-8')
        return f'file://{tmp_path}/page.html'
    return page


READ = TOKENS + """.map(el => {
  el.focus()
  const [figure, cross] = el.lastChild.textContent.trim().split('\\u00a0')
  const blocks = [...document.querySelectorAll('#sd-box table')].map(table => [table.previousSibling.textContent,
    [...table.rows].slice(1).map(row => [...row.cells].map(cell => cell.textContent))])
  return {figure: +figure, cut: cross == '×', marked: el.classList.contains('sd-cut'), colour: el.style.borderColor, blocks}
})"""
BOX = r'temperature ([\d.]+)\ngap ([\d.]+) nats, rank (\d+)\nneeds ([\d.]+): (kept|cut)\ncandidates: (\d+)( or more)?'


def near(text, value, unit):
    "Whether a number is shown as it is, rounded to a unit"
    return abs(float(text) - value) <= unit/2 + 1e-6


def check_percent(text, p):
    "A percentage is right, or a bound that holds"
    number = float(text.strip('≤< %'))/100
    if text[0] in '≤<': assert p <= number + .0005 + 1e-6, (text, p)
    else: assert near(number, p, .001), (text, p)


def check_box(x, plain, said, rows):
    "What the box says of a token is what Python says; `plain` has the probabilities at T = 1, with next to nothing cut"
    T, gap, rank, needs, fate, count, more = re.fullmatch(BOX, said).groups()
    for text,value in ((T, x['temperature']), (gap, x['gap']), (needs, x['needed'])): assert near(text, value, .01), (said, x)
    assert (int(rank), fate) == (x['rank'], 'kept' if x['kept'] else 'cut')
    assert (int(count), bool(more)) == (min(x['count'], MOST), x['count'] >= MOST), (said, x['count'])
    kept = [p for _,p in x['candidates']]
    assert len(rows) == len(x['names']) + (x['rank'] > len(x['names']))
    for i,(name,now,one) in enumerate(rows[:len(x['names'])]):
        assert name == repr(x['names'][i]) or name == 'part of a character' and '\ufffd' in x['names'][i]
        assert (now == 'cut') == (i >= len(kept)) and ('≤' in now) == (bool(more) and i < len(kept))
        if now != 'cut': check_percent(now, kept[i])
        check_percent(one, plain['candidates'][i][1])


@pytest.mark.parametrize('scale', [None, .35, 1.5, 3.999])
def test_the_page_at_a_scale_is_what_python_computes(browser, report, write, scale):
    browser.open(write() + (f'#scale={scale}' if scale else ''))
    shown, groups, plains = browser.js(READ), [], []
    for said,kw in ((SAID, {}), (BESIDE, dict(temperature=1.2))):
        groups += TokenView(report(said, scale=scale or 1., **kw), ASK, .1).groups()
        plains += TokenView(report(said, temperature=1., min_p=1e-9), ASK, .1).groups()
    for x,group,plain in zip(shown, groups, plains, strict=True):
        hottest = max(t['temperature'] for t in group)
        assert near(x['figure'], hottest, .1) and x['cut'] == x['marked'] == (not all(t['kept'] for t in group))
        assert max(abs(int(a) - b) for a,b in zip(re.findall(r'\d+', x['colour']), heat(hottest), strict=True)) <= 1
        for token,open_,block in zip(group, plain, x['blocks'], strict=True): check_box(token, open_, *block)
    sums = browser.js("[...document.querySelectorAll('.sd-sum')].map(p => p.textContent)")
    flat = [t for g in groups for t in g]
    for said in sums: assert said.split(' tokens')[0] in (str(len(report(SAID))), str(len(report(BESIDE))))
    assert sum(int(re.search(r'(\d+) cut', s)[1]) for s in sums) == sum(not t['kept'] for t in flat)
    assert any(len(g) > 1 for g in groups) and any(not t['kept'] for t in flat)
    assert any(t['count'] >= MOST for t in flat) == (scale == 3.999) and not browser.errors()


def test_the_slider_moves_the_numbers_and_the_address_remembers_it(browser, write):
    browser.open(write(scale=1.3))
    look = "[document.getElementById('sd-now').textContent, document.querySelectorAll('.sd-sum')[1].textContent, location.hash]"
    assert browser.js(look)[0] == '1.3' and 'mean temperature 1.56' in browser.js(look)[1]
    browser.js("document.getElementById('sd-scale').focus()")
    for _ in range(4): browser.key('ArrowRight')
    now, said, address = browser.js(look)
    assert (now, address) == ('1.5', '#scale=1.5') and 'mean temperature 1.80' in said
    browser.open(browser.js('location.href'))
    assert browser.js(look) == [now, said, address]
    for wrong in ('0', '-1', 'x', '', 'NaN'):
        browser.js(f"location.hash = 'scale={wrong}'; new Promise(done => setTimeout(done, 50))")
        assert browser.js(look)[0] == '1.3'
    browser.js("location.hash = 'scale=99'; new Promise(done => setTimeout(done, 50))")
    assert browser.js(look)[0] == '4' and not browser.errors()


def test_one_stop_of_the_tab_key_for_each_text_and_arrows_within(browser, write):
    browser.window()
    browser.open(write())
    first = browser.js("document.querySelectorAll('.sd-a')[0].querySelectorAll('.sd-t').length")
    browser.key('Tab')
    assert browser.js('document.activeElement.id') == 'sd-scale'
    browser.key('Tab')
    assert browser.js(ACTIVE) == 0 and browser.js(OPEN)
    assert browser.js("document.activeElement.getAttribute('aria-describedby')") == 'sd-box'
    for key,at in (('ArrowRight', 1), ('ArrowRight', 2), ('ArrowLeft', 1), ('End', first - 1), ('ArrowRight', first - 1), ('Home', 0),
                   ('ArrowLeft', 0), ('ArrowRight', 1)):
        browser.key(key)
        assert browser.js(ACTIVE) == at and browser.js(OPEN), key
    browser.key('Escape')
    assert not browser.js(OPEN) and browser.js(ACTIVE) == 1
    browser.key('Tab')
    assert browser.js(ACTIVE) == first and browser.js(OPEN)
    browser.key('Tab')
    assert browser.js(ACTIVE) == -1 and not browser.js(OPEN)
    browser.js(f'{TOKENS}[{first}].focus()')
    browser.key('Tab', modifiers=8) # shift
    assert browser.js(ACTIVE) == 1 and not browser.errors(), 'the text remembers its token'


def test_up_and_down_go_from_line_to_line(browser, write):
    browser.window(390)
    browser.open(write(said='It is two, since one and one are two, and were two at all times and in all places.'))
    tops = browser.js(f'{TOKENS}.map(el => el.getBoundingClientRect().bottom)')
    browser.js(f'{TOKENS}[1].focus()')
    places = [1]
    for key in ('ArrowDown', 'ArrowDown', 'ArrowUp', 'ArrowUp'):
        browser.key(key)
        places.append(browser.js(ACTIVE))
    lines = [sum(t < tops[p] - 8 and u for t,u in zip(tops, [True] + [b > a + 8 for a,b in zip(tops, tops[1:])])) for p in places]
    assert lines == [0, 1, 2, 1, 0], (places, lines)


def test_the_pointer_opens_the_box_and_may_enter_it(browser, write):
    browser.window()
    browser.open(write())
    def move(selector):
        x, y = browser.js(f"(r => [r.x + r.width/2, r.y + Math.min(r.height/2, 20)])({selector}.getBoundingClientRect())")
        browser.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)
    move(f'{TOKENS}[2]')
    assert browser.js(OPEN)
    said = browser.js("document.getElementById('sd-box').textContent")
    move("document.getElementById('sd-box')")
    assert browser.js(OPEN) and browser.js("document.getElementById('sd-box').textContent") == said
    browser.key('Escape')
    assert not browser.js(OPEN)
    move(f'{TOKENS}[1]')
    assert browser.js(OPEN)
    move("document.querySelector('h1')")
    assert not browser.js(OPEN) and not browser.errors()


@pytest.mark.parametrize('width, height', [(390, 500), (390, 844), (1200, 420), (1200, 800)])
def test_the_box_is_on_the_screen(browser, write, width, height):
    browser.window(width, height)
    browser.open(write())
    edges = browser.js(TOKENS + """.map(el => { el.focus(); const r = document.getElementById('sd-box').getBoundingClientRect()
                                   return [r.left, r.top, innerWidth - r.right, innerHeight - r.bottom, r.height] })""")
    assert all(min(e[:4]) >= 0 and e[4] > 50 for e in edges), edges


def test_on_a_phone_the_answers_stand_below_each_other_and_nothing_is_wider(browser, write):
    address = write(prompt=HOSTILE, said=HOSTILE, beside='-'*400)
    browser.window(390, 844)
    browser.open(address)
    places = "[...document.querySelectorAll('section')].map(s => (r => [r.left, r.top, r.bottom])(s.getBoundingClientRect()))"
    (left, _, bottom), (right, top, _) = browser.js(places)
    assert browser.js('document.documentElement.scrollWidth') <= 390 and left == right and top >= bottom
    browser.window(1200)
    (left, above, _), (right, top, _) = browser.js(places)
    assert above == top and right > left + 300


def test_hostile_text_is_text(browser, report, write):
    browser.open(write(prompt=HOSTILE + '\ud83d', said=HOSTILE))
    assert browser.js("[document.scripts.length, document.images.length]") == [2, 0] and not browser.errors()
    assert browser.js("document.querySelector('details p').textContent") == HOSTILE + '\ufffd'
    title, heading = browser.js("[document.title, document.querySelector('h1').textContent]")
    assert title == heading == '</script><script>boom()</script><img src=x onerror=boom()> "q" \'s\'…'
    about = browser.js("document.querySelector('meta[name=description]').content")
    assert about.startswith('The temperature of each token of “</script><script>boom()</script>')
    shown = browser.js("[...document.querySelectorAll('section:first-child .sd-t')].map(el => el.firstChild.textContent).join('')")
    bare = lambda text: re.sub(r'[\s␣]', '', text)
    assert bare(shown) == bare(HOSTILE + '<|im_end|>')


def test_an_answer_that_ends_inside_a_character_is_shown(browser, report, tmp_path):
    whole = report('🌧')
    half = [x | dict(text='') for x in whole[:2]]
    half[-1]['text'] = '\ufffd'
    (tmp_path/'page.html').write_text(token_page(dict(head=half), '\ude00', 'SmolLM2', .1), encoding='utf-8')
    browser.open(f'file://{tmp_path}/page.html')
    assert browser.js(f'{TOKENS}.map(el => el.firstChild.textContent)') == ['\ufffd'] and browser.js('document.title') == '\ufffd'
    assert not browser.errors()


def luminance(colour):
    "Of an opaque colour"
    parts = [int(x)/255 for x in re.fullmatch(r'rgb\((\d+), (\d+), (\d+)\)', colour).groups()]
    return sum(w*(c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4) for w,c in zip((.2126, .7152, .0722), parts))


def test_light_and_dark_can_be_read(browser, write):
    address, papers = write(prompt='Why? '*30), []
    for scheme in ('light', 'dark'):
        browser.window(scheme=scheme)
        browser.open(address)
        browser.js(f'{TOKENS}[0].focus()')
        colours = browser.js("""['h1', '.sd-t', '.sd-t rt', '.sd-sum', '.sd-note', 'summary', 'output', '#sd-box', '#sd-box td'].map(s => {
          const own = document.querySelector(s)
          let under = own
          while (getComputedStyle(under).backgroundColor == 'rgba(0, 0, 0, 0)') under = under.parentNode
          return [s, getComputedStyle(own).color, getComputedStyle(under).backgroundColor] })""")
        for name,ink,paper in colours:
            a, b = sorted(map(luminance, (ink, paper)))
            assert (b + .05)/(a + .05) >= 4.5, (scheme, name, ink, paper)
        papers.append(luminance(colours[0][2]))
    assert papers[0] > .8 and papers[1] < .05


def test_without_scripts_the_page_is_as_in_a_notebook(browser, write):
    browser.window()
    browser.send('Emulation.setScriptExecutionDisabled', value=True)
    try:
        browser.open(write())
        state = browser.js(TOKENS + """.map(el => {
          el.focus()
          return [el.tabIndex, getComputedStyle(el, '::after').content.slice(1, 13), el.lastChild.textContent.trim().length > 2] })""")
        hidden = browser.js("[...document.querySelectorAll('.sd-js, #sd-box')].map(el => getComputedStyle(el).display)")
    finally: browser.send('Emulation.setScriptExecutionDisabled', value=False)
    assert len(state) > 10 and all(s == [0, 'temperature ', True] for s in state)
    assert hidden == ['none']*3


def test_a_thousand_tokens_are_a_small_page(browser, tmp_path):
    "A model that knows nothing is the hardest: every token keeps all the logits that a page has room for"
    report = reader('smoke')('and so on '*330 + 'Ł🌧'*5)
    page = token_page(dict(head=report), 'Go on', 'smoke', .1)
    (tmp_path/'page.html').write_text(page, encoding='utf-8')
    browser.open(f'file://{tmp_path}/page.html#scale=2')
    assert len(report) >= 1000 and len(page.encode()) < 1e6
    groups = browser.js(f'{TOKENS}.length')
    assert browser.js("document.querySelectorAll('*').length") < 2*groups + 60
    browser.js(f'{TOKENS}[0].focus()')
    browser.key('End')
    said = browser.js("document.getElementById('sd-box').textContent")
    assert browser.js(ACTIVE) == groups - 1 and f"gap {report[-1]['gap']:.2f} nats" in said
    some = f"{TOKENS}.some(x => {{ x.focus(); return document.getElementById('sd-box').textContent.includes('64 or more') }})"
    assert browser.js(some), 'no token has more candidates than a page has room for'
    assert not browser.errors()


def test_ten_thousand_tokens_can_still_be_read(browser, report, tmp_path):
    "More than the model reads at once: the rows of an answer again and again, below a prompt as long"
    some = report('and so on, '*40, scale=1.3)
    many = [x for _ in range(10_000//len(some) + 1) for x in some][:10_000]
    page = token_page(dict(head=many, static=some), 'Go <b>on</b> '*4000, 'SmolLM2', .1, 1.3)
    (tmp_path/'page.html').write_text(page, encoding='utf-8')
    browser.window(390, 844)
    browser.open(f'file://{tmp_path}/page.html')
    assert len(page.encode()) < 2e7 and browser.js(f'{TOKENS}.length') == 10_000 + len(some)
    assert browser.js('document.documentElement.scrollWidth') <= 390
    said = lambda: browser.js("document.getElementById('sd-box').textContent")
    browser.js(f'{TOKENS}[0].focus()')
    for key,at in (('End', 9_999), ('ArrowLeft', 9_998), ('ArrowUp', None), ('Home', 0)):
        browser.key(key)
        now = browser.js(ACTIVE)
        assert now == at if at is not None else 9_900 < now < 9_998
        assert f'gap {many[now]["gap"]:.2f} nats' in said() and browser.js(OPEN)
    browser.js("(x => { x.value = 2; x.dispatchEvent(new Event('input')) })(document.getElementById('sd-scale'))")
    assert f'temperature {2*many[0]["own"]:.2f}' in said()
    mean = sum(2*x['own'] for x in many)/len(many)
    assert re.match(rf'10000 tokens, mean temperature {mean:.2f}, \d+ cut', browser.js("document.querySelector('.sd-sum').textContent"))
    assert not browser.errors()


def test_in_a_notebook_the_box_has_the_probabilities_at_1_too(report):
    for said,kw in ((SAID, {}), (SAID, dict(scale=.4)), (BESIDE, dict(temperature=1.2))):
        boxes = re.findall(r'data-why="(.*?)" style', TokenView(report(said, **kw), ASK, .1)._repr_html_())
        plain = [x for g in TokenView(report(said, temperature=1., min_p=1e-9), ASK, .1).groups() for x in g]
        shown = [box for text in boxes for box in re.split(r'\n(?=temperature )', html.unescape(text))]
        for box,x,one in zip(shown, report(said, **kw), plain, strict=True):
            head, *rows = [line for line in box.split('\n')[3:] if not line.startswith('and ')]
            assert head == f'candidates: {x["count"]}, at T = {x["temperature"]:.2f} and at T = 1' and len(rows) == len(x['candidates'])
            for row,(name,p),(same,q) in zip(rows, x['candidates'], one['candidates']):
                now, then, called = row.split(maxsplit=2)
                assert name == same and (called == repr(name) or '\ufffd' in name)
                check_percent(now, p)
                check_percent(then, q)


def by_definition(tokenizer, ids):
    "What each token adds, from the text of all that stand before it"
    out, shown = [], ''
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        if text.endswith('\ufffd') and n < len(ids): text = shown
        out.append(text[len(shown):])
        shown = text
    return out


BYTES = [f'<0x{b:02X}>' for b in '🌧'.encode()]
PIECES = ['▁', '▁the', '▁cat', 's', '.', '\n', BYTES, 'x']
LEFT = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
MERGE = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(Regex(' +'), ' ')])
KINDS = dict(left=(PIECES, LEFT), merge=(PIECES, MERGE), words=(['the', 'cat', '##s', '.', 'x'], decoders.WordPiece('##', False)))


def made_of(pieces, decoder):
    "A tokenizer of some pieces; and the ids of each piece, of which one that is a list has several"
    names = [p for piece in pieces for p in (piece if isinstance(piece, list) else [piece])]
    inner = Tokenizer(models.WordLevel(dict(zip(names, range(len(names)))), unk_token='x'))
    inner.decoder = decoder
    whole = PreTrainedTokenizerFast(tokenizer_object=inner)
    return whole, [[names.index(p) for p in (piece if isinstance(piece, list) else [piece])] for piece in pieces]


@pytest.mark.parametrize('kind', KINDS)
def test_added_text_is_what_the_definition_says(kind):
    tokenizer, pieces = made_of(*KINDS[kind])
    draw = random.Random(0)
    for _ in range(200):
        ids = [i for _ in range(draw.randrange(1, 20)) for i in draw.choice(pieces)]
        texts = added_text(tokenizer, ids)
        assert texts == by_definition(tokenizer, ids) and ''.join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_added_text_of_any_bytes_in_any_order():
    _, tokenizer = load_model(ROOT/'models/smoke')
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(260) if draw.random() < .7 else draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 20))]
        assert added_text(tokenizer, ids) == by_definition(tokenizer, ids)
    assert added_text(tokenizer, []) == []


@pytest.mark.parametrize('text', ['rain 🌧 ', '\n', ' x', 'word '])
def test_the_work_of_added_text_grows_with_the_number_of_tokens(text):
    _, tokenizer = load_model(ROOT/'models/smoke')
    def work(ids):
        seen = []
        counting = SimpleNamespace(decode=lambda ids, **kw: seen.append(len(ids)) or tokenizer.decode(ids, **kw))
        added_text(counting, ids)
        return sum(seen)
    ids = [i for _ in range(100) for i in tokenizer(text).input_ids]
    assert work(ids*4) < 4.2*work(ids)
