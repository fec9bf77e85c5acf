// Makes elements from text that is never HTML, and forms that tell their values.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

// fields: [name, label, attributes of the input]; send: called with the text of those that were filled in.
export function form(fields, action, send) {
  const inputs = fields.map(([name, label, attributes]) =>
    element("label", {}, label, element("input", { name, autocomplete: "off", ...attributes })));
  const made = element("form", {}, ...inputs, element("button", {}, action));
  made.addEventListener("submit", async (event) => {
    event.preventDefault();
    const pressed = made.querySelector("button");
    pressed.disabled = true;
    const filled = [...new FormData(made)].map(([name, value]) => [name, value.trim()]);
    try {
      await send(Object.fromEntries(filled.filter(([, value]) => value)), made);
    } finally {
      pressed.disabled = false;
    }
  });
  return made;
}

// columns: [heading, cell(row), class]; a cell is text or an element.
export function table(caption, columns, rows, rowClass = () => null) {
  const head = element("tr", {}, ...columns.map(([heading, , kind]) => element("th", { scope: "col", class: kind ?? null }, heading)));
  const body = rows.map((row) => element("tr", { class: rowClass(row) },
    ...columns.map(([, cell, kind]) => element("td", { class: kind ?? null }, cell(row) ?? "–"))));
  return element("div", { class: "scroll" }, element("table", {}, element("caption", {}, caption),
    element("thead", {}, head), element("tbody", {}, ...body)));
}

export const many = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
export const credits = (micro) => (micro / 1e6).toLocaleString("en", { maximumFractionDigits: 6 });
export const day = (time) => time && time.slice(0, 10);
