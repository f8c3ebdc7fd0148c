// What label maps of the viewer and the server say, and how one is written as a file. Pure functions.

/**
 * The header of a raw NRRD file of 8 bits a voxel.
 *
 * @param {object} volume dimensions (columns, rows, slices); spacing in mm along these; direction, the three unit
 *     vectors of these in LPS, one after the other; origin, the first voxel's centre in LPS mm.
 * @returns {string}
 */
export function nrrdHeader({ dimensions, spacing, direction, origin }) {
  const vector = numbers => `(${Array.from(numbers).join(',')})`;
  const axis = a => vector([0, 1, 2].map(c => direction[3 * a + c] * spacing[a]));
  return [
    'NRRD0004',
    'type: unsigned char',
    'dimension: 3',
    'space: left-posterior-superior',
    `sizes: ${Array.from(dimensions).join(' ')}`,
    `space directions: ${axis(0)} ${axis(1)} ${axis(2)}`,
    `space origin: ${vector(origin)}`,
    'kinds: domain domain domain',
    'encoding: raw',
    '\n',
  ].join('\n');
}

/**
 * The labels of a label map, by the names of its segments: the segments' numbers are the viewer's own.
 *
 * @param {Uint8Array} voxels Segment numbers, 0 = none.
 * @param {object} names Segment number -> name.
 * @param {string[]} known The project's labels, in order.
 * @returns {{labels: {name, value, voxels}[], foreign: string[], nameless: number, kept: Uint8Array}} The labels
 *     present; the names that are none of the project; how many voxels have no name, which is what the panel draws
 *     when it is run while no label is chosen; and the voxels without these two and without "background".
 */
export function readLabels(voxels, names, known) {
  const counts = new Uint32Array(256);
  for (let i = 0; i < voxels.length; i++) counts[voxels[i]]++;
  const labels = [];
  const foreign = [];
  let nameless = 0;
  const becomes = new Uint8Array(256);
  for (let value = 1; value < 256; value++) {
    const name = names[value];
    if (!counts[value] || name === 'background') continue;
    if (name === undefined) nameless += counts[value];
    else if (!known.includes(name)) foreign.push(name);
    else {
      becomes[value] = value;
      labels.push({ name, value, voxels: counts[value] });
    }
  }
  labels.sort((a, b) => known.indexOf(a.name) - known.indexOf(b.name));
  return { labels, foreign, nameless, kept: voxels.map(value => becomes[value]) };
}

/** Labels as people read them: voxels, and millilitres for the spacing in mm. */
export function describe(labels, spacing) {
  const millilitres = spacing[0] * spacing[1] * spacing[2] / 1000;
  const part = ({ name, voxels }) =>
    `${name} ${voxels.toLocaleString('en')} voxels (${(voxels * millilitres).toFixed(1)} ml)`;
  return labels.length ? labels.map(part).join(', ') : 'no label at all';
}

/**
 * What /info/ answers, as the panel has to read it.
 *
 * A model that cannot answer yet is listed without labels. Once it can, without the panel having asked again, the panel
 * would draw its values under the viewer's own numbers, and so under wrong names: their names are the project's, in
 * its order. And the panel takes the empty statistics of what was never trained for a training that is at its end.
 */
export function infoForPanel(info) {
  const known = info.labels.filter(name => name !== 'background');
  const named = model => (model.type === 'segmentation' && !Object.keys(model.labels).length
    ? { ...model, labels: known } : model);
  const map = (object, change) => Object.fromEntries(Object.entries(object).map(([name, value]) => [name, change(value)]));
  const trained = Object.entries(info.train_stats ?? {}).filter(([, stats]) => Object.keys(stats).length);
  return { ...info, models: map(info.models, named), train_stats: Object.fromEntries(trained) };
}
