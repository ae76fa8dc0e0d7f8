// The places where a pass changed something, for going from one to the next.

const SAME_PLACE = { down: 160, across: 90 };

// Changed ops that stand close together are one place, those of a fold too; and what was removed on one side and added
// at the same height on the other. `heightOf(picture, y)` is the height in the first picture that belongs to `y`.
function changedPlaces(pictures, marks, heightOf) {
  const found = [];
  if (!marks.size) return found;
  for (const picture of pictures) {
    let last = null;
    for (const item of picture.layout.elements) {
      for (const node of item.fold ? item.members : [...item.stretch.members].sort((a, b) => a.y - b.y)) {
        if (!marks.has(node.number)) continue;
        const isNear = last !== null && last.item === item && (item.fold || node.y - last.bottom < SAME_PLACE.down);
        if (!isNear) found.push((last = { picture, item, node, y: heightOf(picture, node.y) }));
        last.bottom = node.y;
      }
    }
  }
  found.sort((a, b) => a.y - b.y);
  return found.filter((place, index) => {
    const before = found[index - 1];
    return !before || place.y - before.y > SAME_PLACE.across || place.picture === before.picture;
  });
}
