const find = id => document.getElementById(id), sides = [...document.querySelectorAll('.sd-a')]
const sums = [...document.querySelectorAll('.sd-sum')]
const form = find('ask'), said = find('said'), go = find('go'), stop = find('stop')
let running, temperatures

function show({side, text, T, colour}) {
  const blank = text.match(/^\s*/)[0], body = text.slice(blank.length) || '␣'
  const word = document.createElement('ruby'), above = document.createElement('rt')
  word.className = 'sd-t' + (body.length > 24 ? ' sd-long' : '')
  word.style.borderColor = colour
  above.append(`\u00a0${T.toFixed(1)}\u00a0`)
  word.append(body.trimEnd() || body, above)
  sides[side].append(text.trim() ? blank : '', word, text.trim() ? body.slice(body.trimEnd().length) : blank)
  temperatures[side].push(T)
  count(side, '…')
}

function count(side, how) {
  const all = temperatures[side], mean = all.reduce((a, b) => a + b, 0)/all.length
  sums[side].textContent = all.length ? `${all.length} tokens, mean temperature ${mean.toFixed(2)}${how}` : how
}

async function ask(event) {
  event.preventDefault()
  running?.abort()
  const me = running = new AbortController(), read = name => Number(form.elements[name].value)
  temperatures = [[], []]
  for (const x of [...sides, ...sums, said]) x.textContent = ''
  stop.hidden = false
  try {
    const settings = {temperature: read('temperature'), scale: read('scale'), seed: read('seed')}
    const body = JSON.stringify({prompt: form.elements.prompt.value, ...settings})
    const answer = await fetch('answer', {method: 'POST', headers: {'Content-Type': 'application/json'}, body, signal: me.signal})
    if (!answer.ok) { said.textContent = (await answer.json()).error; return }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let rest = '', more; !(more = await reader.read()).done;) {
      const lines = (rest + more.value).split('\n')
      rest = lines.pop()
      for (const x of lines.map(line => JSON.parse(line)))
        if (x.error) said.textContent = x.error
        else if (x.text === undefined) count(x.side, x.ended ? '' : `, cut at ${x.most} tokens`)
        else show(x)
    }
  } catch (e) { if (e.name != 'AbortError') said.textContent = 'The demo has stopped answering: is it still running in the terminal?' }
  finally { if (running === me) stop.hidden = true }
}
form.addEventListener('submit', ask)
stop.addEventListener('click', () => { running.abort(); sums.forEach((_, side) => count(side, ', stopped')) })
form.elements.prompt.addEventListener('keydown', e => { if (e.key == 'Enter' && !e.shiftKey) { e.preventDefault(); form.requestSubmit() } })
for (const b of document.querySelectorAll('.try'))
  b.addEventListener('click', () => { form.elements.prompt.value = b.textContent; form.requestSubmit() })
