// Small line charts. One look, no library: a dozen points with error bars, or a few thousand without.

const CHART = { width: 250, height: 118, left: 42, right: 10, top: 10, bottom: 20 };

// points: [{x, y, error}]; format: number -> text
function lineChart({ title, points, format = short, from }) {
  const known = points.filter(({ y }) => y !== null && y !== undefined && Number.isFinite(y));
  if (!known.length) return null;
  const thin = thinned(known);
  const [x, y] = [scale(thin.map((p) => p.x)), scale(thin.flatMap((p) => [p.y - (p.error || 0), p.y + (p.error || 0)]), from)];
  const { width, height, left, right, top, bottom } = CHART;
  const px = (value) => left + x.share(value) * (width - left - right);
  const py = (value) => height - bottom - y.share(value) * (height - top - bottom);
  const last = known[known.length - 1];
  const grid = y.ticks.map((value) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: py(value), y2: py(value) }),
    svg("text", { x: left - 5, y: py(value) + 3, "text-anchor": "end" }, format(value))]);
  const ends = [...new Set([thin[0].x, thin[thin.length - 1].x])].map((value, k) =>
    svg("text", { x: px(value), y: height - 5, "text-anchor": k ? "end" : "start" }, short(value)));
  const bars = thin.filter((p) => p.error).map((p) => svg("line", { class: "error", x1: px(p.x), x2: px(p.x), y1: py(p.y - p.error), y2: py(p.y + p.error) }));
  const dots = thin.length > 60 ? [] : thin.map((p) => svg("circle", { cx: px(p.x), cy: py(p.y), r: thin.length > 20 ? 1.5 : 2.5 },
    svg("title", {}, `${short(p.x)}: ${format(p.y)}${p.error ? ` ± ${format(p.error)}` : ""}`)));
  const line = svg("polyline", { points: thin.map((p) => `${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join(" ") });
  const summary = `${title}: from ${format(known[0].y)} to ${format(last.y)}`;
  return h("figure", { class: "chart" },
    h("figcaption", {}, title, h("b", {}, format(last.y))),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": summary }, grid, ends, bars, line, dots));
}

// At most a few hundred points: the smallest and the largest of each stretch
function thinned(points) {
  const stretch = Math.ceil(points.length / 200);
  if (stretch < 2) return points;
  const kept = [];
  for (let k = 0; k < points.length; k += stretch) {
    const part = points.slice(k, k + stretch).sort((a, b) => a.y - b.y);
    kept.push(...[...new Set([part[0], part[part.length - 1]])].sort((a, b) => a.x - b.x));
  }
  return kept;
}

// Ticks at round numbers around the values
function scale(values, from) {
  let low = Math.min(...values, from ?? Infinity), high = Math.max(...values);
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((size) => size >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return { ticks, share: (value) => (value - low) / (high - low) };
}
