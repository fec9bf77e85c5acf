// OpenAI's client for Node, against a real server.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { test } from "node:test";

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = process.env.MODEL;
const messages = [{ role: "user", content: "hello" }];
const short = { model, messages, max_tokens: 12, temperature: 0 };
const options = { baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY, maxRetries: 0 };
const client = new OpenAI(options);

const Zone = z.object({ zone: z.enum(["UTC", "CET"]) });
const clock = {
  type: "function",
  function: {
    name: "clock",
    parameters: {
      type: "object",
      properties: { zone: { type: "string", enum: ["UTC", "CET"] } },
      required: ["zone"],
      additionalProperties: false,
    },
  },
};
const forced = { model, messages, tools: [clock], parallel_tool_calls: false, max_tokens: 2000 };

test("an answer", async () => {
  const body = await client.chat.completions.create(short);
  assert.equal(body.object, "chat.completion");
  assert.equal(body.choices[0].finish_reason, "length");
  assert.equal(body.usage.completion_tokens, 12);
  assert.ok(body.choices[0].message.content);
  assert.ok(body._request_id);
});

test("a stream with usage", async () => {
  const whole = await client.chat.completions.create(short);
  const stream = await client.chat.completions.create({
    ...short,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let last;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    last = chunk;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(last.usage.total_tokens, whole.usage.total_tokens);
});

test("the stream helper", async () => {
  const stream = client.chat.completions.stream({ ...short, stream_options: { include_usage: true } });
  const whole = await client.chat.completions.create(short);
  assert.equal(await stream.finalContent(), whole.choices[0].message.content);
  assert.equal((await stream.totalUsage()).completion_tokens, 12);
});

test("three choices", async () => {
  const body = await client.chat.completions.create({ ...short, temperature: 1, n: 3, seed: 1 });
  assert.deepEqual(body.choices.map((choice) => choice.index), [0, 1, 2]);
});

test("a forced tool call", async () => {
  for (const tool_choice of ["required", { type: "function", function: { name: "clock" } }]) {
    const body = await client.chat.completions.create({ ...forced, tool_choice });
    const [call] = body.choices[0].message.tool_calls;
    assert.equal(call.function.name, "clock");
    Zone.strict().parse(JSON.parse(call.function.arguments));
  }
});

test("a streamed tool call", async () => {
  const stream = client.chat.completions.stream({ ...forced, tool_choice: "required" });
  const body = await stream.finalChatCompletion();
  assert.equal(body.choices[0].finish_reason, "tool_calls");
  Zone.strict().parse(JSON.parse(body.choices[0].message.tool_calls[0].function.arguments));
});

test("an answer of a given form", async () => {
  const body = await client.chat.completions.parse({
    model,
    messages,
    max_tokens: 2000,
    response_format: zodResponseFormat(Zone, "zone"),
  });
  assert.ok(["UTC", "CET"].includes(body.choices[0].message.parsed.zone));
});

test("a response", async () => {
  const body = await client.responses.create({ model, input: "hello", max_output_tokens: 16 });
  assert.ok(body.output_text);
});

test("models", async () => {
  const models = await client.models.list();
  assert.deepEqual(models.data.map((entry) => entry.id), [model]);
});

test("errors become exceptions", async () => {
  const stranger = new OpenAI({ ...options, apiKey: "sk-wrong" });
  await assert.rejects(stranger.chat.completions.create(short), (error) => {
    assert.ok(error instanceof OpenAI.AuthenticationError);
    assert.equal(error.code, "invalid_api_key");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...short, model: "nobody" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...short, temperature: 3 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    assert.match(error.message, /temperature|less than|2/);
    return true;
  });
});

test("the snippet", () => {
  assert.ok(execFileSync(process.execPath, ["snippet.mjs"], { encoding: "utf8", timeout: 60_000 }).trim());
});
