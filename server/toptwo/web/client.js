// What the page asks of the server: as a manager with a key in a header, or as an owner with a session's cookie.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const MOST = 200; // rows of a page

async function send(method, path, headers, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: body === undefined ? headers : { ...headers, "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
    });
  } catch {
    throw new Refused(0, "The server cannot be reached.");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, told.error?.message ?? `The server answered ${answer.status}.`);
  }
  return answer;
}

async function all(page) {
  const rows = [];
  for (let after = null; ; after = rows.at(-1).id) {
    const { data, has_more: more } = await (await page(after)).json();
    rows.push(...data);
    if (!more) return rows;
  }
}

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== null));

class Client {
  async json(method, path, body) {
    return (await this.send(method, path, body)).json();
  }

  revoke(key) {
    return this.json("DELETE", `/keys/${encodeURIComponent(key)}`);
  }

  rotate(key) {
    return this.json("POST", `/keys/${encodeURIComponent(key)}/rotate`, {});
  }
}

export class Manager extends Client {
  canManage = true;
  #key;

  constructor(key) {
    super();
    this.#key = key;
  }

  send(method, path, body) {
    return send(method, `/v3/admin${path}`, { authorization: `Bearer ${this.#key}` }, body);
  }

  accounts() {
    return all((after) => this.send("GET", `/accounts?${query({ after, limit: MOST })}`));
  }

  account(id) {
    return this.json("GET", `/accounts/${encodeURIComponent(id)}`);
  }

  createAccount(body) {
    return this.json("POST", "/accounts", body);
  }

  changeAccount(id, body) {
    return this.json("PATCH", `/accounts/${encodeURIComponent(id)}`, body);
  }

  credit(id, body) {
    return this.json("POST", `/accounts/${encodeURIComponent(id)}/credit`, body);
  }

  keys(account) {
    return all((after) => this.send("GET", `/keys?${query({ account_id: account, after, limit: MOST })}`));
  }

  createKey(account, body) {
    return this.json("POST", "/keys", { ...body, account_id: account });
  }

  usage(account, values) {
    return this.send("GET", `/usage?${query({ account_id: account, ...values })}`);
  }
}

export class Owner extends Client {
  canManage = false;

  send(method, path, body) {
    return send(method, `/console/account${path}`, {}, body);
  }

  account() {
    return this.json("GET", "");
  }

  keys() {
    return all((after) => this.send("GET", `/keys?${query({ after, limit: MOST })}`));
  }

  createKey(_account, body) {
    return this.json("POST", "/keys", body);
  }

  usage(_account, values) {
    return this.send("GET", `/usage?${query(values)}`);
  }
}

export async function providers() {
  return (await (await send("GET", "/console/providers", {})).json()).providers;
}

export function signOut() {
  return send("POST", "/console/sign-out", {});
}
