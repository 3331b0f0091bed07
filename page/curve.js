// Quality by size, as a line in an SVG of 300 x 150.

const LEFT = 30,
  RIGHT = 290,
  TOP = 12,
  BOTTOM = 122;

/** points: {bytes, psnr, isHere}, smallest first; least and most: the bytes at the ends. */
export function drawCurve(svg, points, least, most) {
  const values = points.map(({ psnr }) => psnr);
  const lowest = Math.floor(Math.min(...values) - 0.5),
    highest = Math.ceil(Math.max(...values) + 0.5);
  const x = (bytes) => LEFT + ((RIGHT - LEFT) * (bytes - least)) / Math.max(1, most - least);
  const y = (psnr) => BOTTOM - ((BOTTOM - TOP) * (psnr - lowest)) / (highest - lowest);
  const line = points.map(
    ({ bytes, psnr }, place) => `${place ? "L" : "M"}${x(bytes).toFixed(1)} ${y(psnr).toFixed(1)}`,
  );
  svg.replaceChildren(
    ...[lowest, highest].map((psnr) => made("line", { x1: LEFT, x2: RIGHT, y1: y(psnr), y2: y(psnr) })),
    ...[lowest, highest].map((psnr) => label(LEFT - 5, y(psnr) + 3, psnr, "end")),
    label(LEFT - 5, (TOP + BOTTOM) / 2, "dB", "end"),
    ...[
      [LEFT, least],
      [(LEFT + RIGHT) / 2, "bytes"],
      [RIGHT, most],
    ].map(([place, text]) => label(place, BOTTOM + 16, text)),
    made("path", { d: line.join("") }),
    ...points
      .filter(({ isHere }) => isHere)
      .map(({ bytes, psnr }) => made("circle", { cx: x(bytes), cy: y(psnr), r: 6 })),
  );
}

const label = (x, y, text, anchor = "middle") => made("text", { x, y, "text-anchor": anchor }, text);

function made(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}
