// Who is there, and what they are shown.

import { showAccount } from "./account.js";
import { Manager, Owner, providers, Refused, signOut } from "./client.js";
import { button, credits, day, element, form, many, table } from "./elements.js";

const view = document.querySelector("#view");
const notice = document.querySelector("#notice");
const who = document.querySelector("#who");
const leave = document.querySelector("#sign-out");
const KEPT = "toptwo-management-key"; // in this tab only, until it is closed

const REASONS = {
  declined: "You were not signed in: the provider was told not to.",
  expired: "Signing in took too long, or began elsewhere. Try again.",
  not_admitted: "You may not sign in here. Ask those who run this server.",
  provider_failed: "The provider could not say who you are. Try again, or ask those who run this server.",
  unavailable: "Accounts cannot be used now. Try again shortly.",
};

function say(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

// Does it, and shows what goes wrong; whoever is not known any more has to sign in again.
async function guard(work) {
  say("");
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) await showSignIn();
    say(error.message);
  }
}

function enter(name) {
  who.textContent = name;
  leave.hidden = false;
}

async function showSignIn() {
  sessionStorage.removeItem(KEPT);
  who.textContent = "";
  leave.hidden = true;
  const ways = (await providers()).map(({ name, label }) =>
    element("a", { href: `/console/sign-in/${name}` }, `Sign in with ${label}`));
  const key = form(
    [["key", "Management key", { type: "password", required: true, spellcheck: "false" }]],
    "Sign in",
    ({ key: given }) => guard(async () => {
      await showAccounts(new Manager(given));
      sessionStorage.setItem(KEPT, given);
    }),
  );
  view.replaceChildren(element("h2", {}, "Sign in"), element("div", { class: "ways" }, ...ways, key));
}

async function showAccounts(client) {
  const accounts = await client.accounts();
  enter("management");
  const open = (id) => guard(() => showAccount(view, client, id, guard, () => guard(() => showAccounts(client))));
  const create = form(
    [["name", "Name of a new account", { required: true, maxlength: 200 }],
      ["email", "E-mail", { type: "email", maxlength: 320 }]],
    "Create account",
    (given) => guard(async () => open((await client.createAccount(given)).id)),
  );
  const columns = [
    ["Name", (account) => button(account.name, () => open(account.id), { class: "plain" })],
    ["E-mail", (account) => account.email], ["Status", (account) => account.status],
    ["Credits", (account) => credits(account.balance_microcredits), "number"],
    ["Created", (account) => day(account.created_at)], ["Account", (account) => account.id],
  ];
  accounts.sort((one, other) => one.name.localeCompare(other.name));
  view.replaceChildren(element("h2", {}, "Accounts"), create,
    table(many(accounts.length, "account"), columns, accounts, (account) => account.status === "active" ? null : "ended"));
}

async function showOwn() {
  const client = new Owner();
  const account = await client.account();
  enter(account.email ?? account.name);
  await showAccount(view, client, account.id, guard, null);
}

leave.addEventListener("click", () => guard(async () => {
  const isManager = sessionStorage.getItem(KEPT) !== null;
  if (!isManager) await signOut();
  await showSignIn();
}));

await guard(async () => {
  const reason = new URLSearchParams(location.hash.slice(1)).get("sign-in");
  history.replaceState(null, "", location.pathname);
  const kept = sessionStorage.getItem(KEPT);
  if (kept) return showAccounts(new Manager(kept));
  if (!reason && (await providers()).length) {
    try {
      return await showOwn();
    } catch (error) {
      if (!(error instanceof Refused && error.status === 401)) throw error;
    }
  }
  await showSignIn();
  if (reason) say(REASONS[reason] ?? REASONS.provider_failed);
});
