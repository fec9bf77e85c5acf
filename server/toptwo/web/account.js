// One account: its credit, its keys, what it has used.

import { chart, lastDays, MEASURES } from "./chart.js";
import { button, credits, day, element, form, many, table } from "./elements.js";
import { showSecret } from "./secret.js";

const DAYS = 30, SECONDS_PER_DAY = 86400;

// guard(work): does it, and shows what goes wrong. leave: called to go back to all accounts, if there are any.
export async function showAccount(view, client, id, guard, leave) {
  const again = () => guard(() => showAccount(view, client, id, guard, leave));
  const account = await client.account(id);
  const [keys, usage] = await Promise.all([keysPart(client, account, guard, again), usagePart(client, account, guard)]);
  view.replaceChildren(
    element("div", { class: "row" }, leave && button("← Accounts", leave, { class: "plain" }),
      element("h2", { id: "account-name" }, account.name), element("span", { class: "quiet" },
        `${account.id} · ${credits(account.balance_microcredits)} credits · ${account.status}`)),
    ...(client.canManage ? managePart(client, account, guard, again) : []),
    ...keys,
    ...usage,
  );
}

function managePart(client, account, guard, again) {
  const change = (status) => guard(async () => {
    await client.changeAccount(account.id, { status });
    await again();
  });
  const credit = form(
    [["amount", "Credits to add, or to take", { type: "number", step: "0.000001", required: true }],
      ["note", "Note", { maxlength: 500 }]],
    "Book",
    ({ amount, note }) => guard(async () => {
      await client.credit(account.id, { amount_microcredits: Math.round(Number(amount) * 1e6), note: note ?? "" });
      await again();
    }),
  );
  const isActive = account.status === "active";
  credit.append(button(isActive ? "Suspend the account" : "Activate the account",
    () => change(isActive ? "suspended" : "active"), { class: "plain" }));
  return [credit];
}

async function keysPart(client, account, guard, again) {
  const keys = await client.keys(account.id);
  const make = (work) => guard(async () => {
    const made = await work();
    await showSecret(made.key);
    await again();
  });
  const actions = (key) => key.status !== "active" ? null : element("span", {},
    button("Rotate", () => make(() => client.rotate(key.id)), { class: "plain" }), " ",
    button("Revoke", () => {
      if (confirm(`Revoke the key “${key.name}”? Whoever uses it is refused from now on.`)) {
        guard(async () => {
          await client.revoke(key.id);
          await again();
        });
      }
    }, { class: "plain" }));
  const create = form(
    [["name", "Name of a new key", { required: true, maxlength: 200 }],
      ["days", "Ends in days", { type: "number", min: 1, max: 3650, placeholder: "never" }],
      ["requests", "Requests a minute", { type: "number", min: 1, placeholder: "no limit" }],
      ["tokens", "Tokens a minute", { type: "number", min: 1, placeholder: "no limit" }]],
    "Create key",
    (given) => make(() => client.createKey(account.id, keyBody(given))),
  );
  const columns = [
    ["Name", (key) => key.name], ["Key", (key) => `${key.id}…${key.last4}`], ["Status", (key) => key.status],
    ["Created", (key) => day(key.created_at)], ["Ends", (key) => day(key.expires_at)],
    ["Last used", (key) => day(key.last_used_at)], ["", actions],
  ];
  keys.sort((one, other) => other.created_at.localeCompare(one.created_at));
  return [element("h2", {}, "Keys"), create,
    table(many(keys.length, "key"), columns, keys, (key) => key.status === "active" ? null : "ended")];
}

function keyBody({ name, days, requests, tokens }) {
  const limits = {};
  if (requests) limits.requests_per_minute = Number(requests);
  if (tokens) limits.tokens_per_minute = Number(tokens);
  const body = { name, limits };
  if (days) body.expires_at = Math.round(Date.now() / 1000) + Number(days) * SECONDS_PER_DAY;
  return body;
}

async function usagePart(client, account, guard) {
  const days = lastDays(DAYS), since = { from: days[0], to: days.at(-1) };
  const { data: rows } = await (await client.usage(account.id, { by: "day", ...since })).json();
  const { data: models } = await (await client.usage(account.id, { by: "model", ...since })).json();
  const place = element("div", { id: "usage" });
  const choice = element("select", { "aria-label": "What to show", onchange: () => draw() },
    ...Object.entries(MEASURES).map(([name, [label]]) => element("option", { value: name }, label)));
  const draw = () => place.replaceChildren(chart(days, rows, choice.value));
  const download = () => guard(async () => {
    const answer = await client.usage(account.id, { by: "day,key,model", format: "csv", ...since });
    const url = URL.createObjectURL(await answer.blob());
    element("a", { href: url, download: `usage-${account.id}-${since.to}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
  draw();
  const count = (value) => value.toLocaleString("en");
  const columns = [
    ["Model", (row) => row.model], ["Requests", (row) => count(row.requests), "number"],
    ["Prompt tokens", (row) => count(row.prompt_tokens), "number"],
    ["of them cached", (row) => count(row.cached_tokens), "number"],
    ["Completion tokens", (row) => count(row.completion_tokens), "number"],
    ["Credits", (row) => credits(row.cost_microcredits), "number"],
  ];
  return [element("div", { class: "row" }, element("h2", {}, `Usage of the last ${DAYS} days`), choice,
    button("Download as CSV", download, { class: "plain" })), place,
  table("By model", columns, models)];
}
