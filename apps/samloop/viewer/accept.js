// A bar in OHIF's MONAI Label mode that accepts what is segmented there, and opens the next case.
//
// The viewer's panel runs models and draws what they answer, but it has no way to save a label. This script takes the
// panel's label map from the viewer and sends it as a file that says where its voxels lie in the patient and what its
// values are called, so that the server checks both, whatever the slices' order and the viewer's own numbers.
import { describe, infoForPanel, nrrdHeader, readLabels } from './labelmap.mjs';

const NONE_LEFT = 'No case is left: all are accepted.';
const SEGMENTATION = '1'; // the id that the panel gives its segmentation

// The viewer

/** The volume of the panel's label map, once the panel has connected. */
function labelmap() {
  const service = window.services?.segmentationService;
  return service?.getSegmentation(SEGMENTATION) ? service.getLabelmapVolume(SEGMENTATION) : null;
}

/** The panel's label map, the names of its segments, and the series it lies on. */
function segmented() {
  const volume = labelmap();
  if (!volume) throw new Error('Connect to the server first (the round arrow below), then segment.');
  const { segmentationService, viewportGridService, displaySetService } = window.services;
  const series = volume.metadata.SeriesInstanceUID;
  const { viewports, activeViewportId } = viewportGridService.getState();
  const shown = displaySetService.getDisplaySetByUID(viewports.get(activeViewportId).displaySetInstanceUIDs[0]);
  if (shown.SeriesInstanceUID !== series || [...proposals().series].some(uid => uid !== series)) {
    throw new Error('The active view, or a proposal, is of another series than the segmentation. Reload the page, ' +
      'and open no other series in a view before this one is accepted.');
  }
  if (segmentationService.getSegmentations().length > 1) {
    throw new Error('Another segmentation is open, so what is shown is not what would be accepted. Reload the page, ' +
      'and do not open it.');
  }
  const segments = Object.values(segmentationService.getSegmentation(SEGMENTATION).segments);
  return {
    series,
    volume,
    names: Object.fromEntries(segments.map(segment => [segment.segmentIndex, segment.label])),
    voxels: new Uint8Array(volume.voxelManager.getCompleteScalarDataArray()),
  };
}

// The panel takes the first of all segmentations for its own; an accepted one that was opened before breaks it.
const mended = new WeakSet();
function mend(service) {
  if (!service || mended.has(service)) return;
  const all = service.getSegmentations.bind(service);
  const own = segmentation => Number(segmentation.segmentationId === SEGMENTATION);
  service.getSegmentations = () => [...all()].sort((a, b) => own(b) - own(a));
  mended.add(service);
}

// What the panel asks of the server

let made = null;

/** What models drew into the label map that is there now. */
function proposals() {
  const id = labelmap()?.volumeId ?? null;
  if (made?.id !== id) made = { id, model: null, series: new Set(), unsaved: false };
  return made;
}

const open = XMLHttpRequest.prototype.open;
XMLHttpRequest.prototype.open = function (method, url, ...rest) {
  const asked = new URL(url, location.href);
  const [, what, name] = asked.pathname.match(/\/(infer|train|activelearning)\/([^/]*)$/) ?? [];
  if (/\/info\/$/.test(asked.pathname)) this.addEventListener('readystatechange', () => informed(this));
  if (!what || method.toUpperCase() === 'GET') return open.call(this, method, url, ...rest);
  this.addEventListener('load', () => {
    if (this.status !== 200) return explain(this);
    say('');
    if (what === 'infer') {
      const drawn = proposals();
      drawn.model = decodeURIComponent(name);
      drawn.series.add(asked.searchParams.get('image'));
      drawn.unsaved = true;
    } else if (what === 'activelearning') {
      if (this.response === '{}') say(NONE_LEFT, 'good');
      // The panel puts the next study after the last "=" of the address, and must find no series of this one there.
      history.replaceState(history.state, '', location.href.replace(/SeriesInstanceUIDs=[^&]*&/, ''));
    }
  });
  if (what === 'activelearning') { // the panel asks for a random case, whatever its list of strategies says
    const chosen = document.querySelector('.monaiLabelPanel select.actionInput')?.value ?? name;
    asked.pathname = asked.pathname.replace(/[^/]*$/, encodeURIComponent(chosen));
  }
  return open.call(this, method, asked.href, ...rest);
};

/** Have the panel read /info/ as it has to. */
function informed(request) {
  if (request.readyState !== XMLHttpRequest.DONE) return;
  if (request.status !== 200) return explain(request);
  const value = JSON.stringify(infoForPanel(JSON.parse(request.responseText)));
  Object.defineProperties(request, { response: { value }, responseText: { value } });
}

/** Say why a request of the panel failed, since the panel says only that it did. */
function explain({ status, response }) {
  let detail;
  try {
    const text = response instanceof ArrayBuffer ? new TextDecoder().decode(response) : response;
    detail = JSON.parse(text).detail;
  } catch { /* not the server's own answer */ }
  tell(failure(status, detail));
}

// The server

function failure(status, detail) {
  const login = status === 401;
  const text = login ? 'You are not logged in. Log in, in a new tab, then try again here.' : detail;
  const unsaid = status ? `The server answered ${status}.` : 'The server does not answer. Try again.';
  return Object.assign(new Error(text || unsaid), { status, login });
}

async function call(method, path, body) {
  const form = body instanceof FormData;
  let reply;
  try {
    reply = await fetch(path, {
      method,
      body: body && !form ? JSON.stringify(body) : body,
      headers: body && !form ? { 'content-type': 'application/json' } : {},
    });
  } catch {
    throw failure(0);
  }
  const content = await reply.json().catch(() => ({}));
  if (!reply.ok) throw failure(reply.status, content.detail);
  return content;
}

async function accept() {
  const { series, volume, names, voxels } = segmented();
  say('Checking ...');
  const { labels: listed } = await call('GET', '/info/');
  const known = listed.filter(name => name !== 'background');
  const { labels, foreign, nameless, kept } = readLabels(voxels, names, known);
  const id = encodeURIComponent(series);
  const before = await call('GET', `/datastore/label/info?label=${id}&tag=final`).catch(error => {
    if (error.status !== 404) throw error;
    return {};
  });
  const what = describe(labels, volume.spacing);
  const questions = [
    foreign.length && `${foreign.join(', ')}: no label of this project, which has ${known.join(', ')}. Leave it out?`,
    nameless && `${nameless.toLocaleString('en')} voxels were proposed while no label was chosen. Leave them out?`,
    !labels.length && 'Nothing is segmented. Accept that this case shows none of the labels?',
    before.ts && `This case was accepted before. Replace that label by ${what}?`,
  ];
  for (const question of questions) if (question && !await ask(question)) return;
  say(`Saving ${what} ...`);
  const info = { label_info: labels.map(({ name, value }) => ({ name, idx: value, value })), client_id: 'ohif' };
  const drawn = proposals();
  const form = new FormData();
  form.append('params', JSON.stringify(drawn.model ? { ...info, model: drawn.model } : info));
  form.append('label', new Blob([nrrdHeader(volume), kept]), 'label.nrrd');
  const { dicom_seg: seg } = await call('PUT', `/datastore/label?image=${id}&tag=final`, form);
  drawn.unsaved = false;
  const waits = seg?.state === 'waiting' ? ` It goes to the image archive when that answers (${seg.reason}).` : '';
  say(`Accepted: ${what}.${waits}`, 'good');
}

async function next() {
  if (proposals().unsaved && !await ask('What is segmented here is not accepted. Leave it?')) return;
  say('Asking for the next case ...');
  const [strategy] = Object.keys((await call('GET', '/info/')).strategies);
  const found = await call('POST', `/activelearning/${encodeURIComponent(strategy)}`, { client_id: 'ohif' });
  if (!found.id) return say(NONE_LEFT, 'good');
  if (!found.StudyInstanceUID) throw new Error(`The server names no study of case ${found.id}.`);
  const place = { SeriesInstanceUIDs: found.id, StudyInstanceUIDs: found.StudyInstanceUID };
  location.assign(`/ohif/monai-label?${new URLSearchParams(place)}`);
}

// The bar

const style = new CSSStyleSheet();
style.replaceSync(`
  #samloop-accept { margin: 8px 4px; padding: 8px; border: 1px solid #00a4d9; border-radius: 6px; color: #fff;
    font-size: 13px; line-height: 1.4; }
  #samloop-accept button { padding: 4px 12px; margin-right: 6px; border-radius: 6px; background: #00a4d9; color: #fff; }
  #samloop-accept button:disabled { opacity: .4; cursor: default; }
  #samloop-accept :focus-visible { outline: 2px solid #fff; outline-offset: 1px; }
  #samloop-accept [role=status]:not(:empty), #samloop-accept .answers { margin-top: 6px; overflow-wrap: anywhere; }
  #samloop-accept .good { color: #7ee29a; }
  #samloop-accept .bad { color: #ff9b8f; }
  .monaiLabelPanel .w3-container { color: #000; padding-left: 4px; } /* the panel writes its figures white on white */
  #samloop-accept a { margin-left: 6px; text-decoration: underline; }
`);
document.adoptedStyleSheets = [...document.adoptedStyleSheets, style];

function element(tag, properties, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

const button = (textContent, onclick) => element('button', { type: 'button', textContent, onclick });
const status = element('div', { role: 'status' });
const answers = element('div', { className: 'answers', hidden: true });
const buttons = [button('Accept', () => run(accept)), button('Next sample', () => run(next))];
const bar = element('section', { id: 'samloop-accept', ariaLabel: 'Accept' }, ...buttons, status, answers);
bar.addEventListener('keydown', event => event.stopPropagation()); // else the viewer's hotkeys take Space

function say(text, kind = '') {
  status.className = kind;
  status.replaceChildren(text);
}

function tell(error) {
  say(error.message, 'bad');
  const link = { href: '/login?next=/ohif/', target: '_blank', textContent: 'Log in' };
  if (error.login) status.append(element('a', link));
}

/** Ask in the bar; resolves to whether the answer was yes. */
function ask(question) {
  say(question);
  return new Promise(resolve => {
    const answer = value => {
      answers.hidden = true;
      say('');
      resolve(value);
    };
    answers.replaceChildren(button('Yes', () => answer(true)), button('No', () => answer(false)));
    answers.hidden = false;
    answers.firstChild.focus();
  });
}

async function run(action) {
  buttons.forEach(each => { each.disabled = true; });
  try {
    await action();
  } catch (error) {
    tell(error);
  }
  buttons.forEach(each => { each.disabled = false; });
}

// The viewer draws and removes its panel as it likes; the bar is put back at its top.
setInterval(() => {
  mend(window.services?.segmentationService);
  const panel = document.querySelector('.monaiLabelPanel');
  if (panel && bar.parentElement !== panel) panel.prepend(bar);
}, 300);
