// Bars of what was used on each of the last days. Days without use are there too.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 900, HEIGHT = 220, LEFT = 64, BOTTOM = 24, TOP = 12;

export const MEASURES = {
  tokens: ["Tokens", (row) => row.prompt_tokens + row.completion_tokens],
  requests: ["Requests", (row) => row.requests],
  cost: ["Credits", (row) => row.cost_microcredits / 1e6],
};

export function lastDays(count, now = new Date()) {
  return Array.from({ length: count }, (_, back) => {
    const at = new Date(now);
    at.setUTCDate(at.getUTCDate() - (count - 1 - back));
    return at.toISOString().slice(0, 10);
  });
}

function part(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const short = (value) => value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 2 });

export function chart(days, rows, measure) {
  const [label, of] = MEASURES[measure];
  const used = new Map(rows.map((row) => [row.day, of(row)]));
  const most = Math.max(...used.values(), 0) || 1;
  const step = (WIDTH - LEFT) / days.length, room = HEIGHT - BOTTOM - TOP;
  const total = [...used.values()].reduce((sum, value) => sum + value, 0);
  const made = part("svg", {
    class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${label} per day, ${days[0]} to ${days.at(-1)}: ${short(total)} in all`,
  });
  for (const share of [0, 0.5, 1]) {
    const y = HEIGHT - BOTTOM - share * room;
    made.append(part("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y }));
    made.append(part("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, short(share * most)));
  }
  days.forEach((day, index) => {
    const value = used.get(day) ?? 0, height = (value / most) * room, x = LEFT + index * step;
    const bar = part("rect", {
      class: "bar", x: x + step * 0.1, width: step * 0.8, y: HEIGHT - BOTTOM - height, height, "data-day": day,
    });
    bar.append(part("title", {}, `${day}: ${value.toLocaleString("en")} ${label.toLowerCase()}`));
    made.append(bar);
    if (index % 7 === 0) made.append(part("text", { x, y: HEIGHT - 8 }, day.slice(5)));
  });
  return made;
}
