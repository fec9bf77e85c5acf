// Vercel's AI SDK, which checks every chunk against a schema, against a real server.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const settings = {
  name: "toptwo",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
};
const model = createOpenAICompatible(settings)(process.env.MODEL);
const short = { model, prompt: "hello", maxOutputTokens: 12, temperature: 0, maxRetries: 0 };
const long = { model, prompt: "hello", maxOutputTokens: 2000, maxRetries: 0 };
const Zone = z.object({ zone: z.enum(["UTC", "CET"]) });
const forced = { ...long, tools: { clock: tool({ inputSchema: Zone }) }, toolChoice: "required" };

test("generateText", async () => {
  const answer = await generateText(short);
  assert.ok(answer.text);
  assert.equal(answer.finishReason, "length");
  assert.equal(answer.usage.outputTokens, 12);
  assert.ok(answer.usage.inputTokens > 0);
  assert.deepEqual(answer.warnings, []);
});

test("streamText", async () => {
  const stream = streamText({ ...short, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, (await generateText(short)).text);
  assert.equal((await stream.usage).outputTokens, 12);
  assert.equal(await stream.finishReason, "length");
});

test("generateObject", async () => {
  const { object, usage } = await generateObject({ ...long, schema: Zone });
  assert.ok(["UTC", "CET"].includes(object.zone));
  assert.ok(usage.outputTokens > 0);
});

test("streamObject", async () => {
  const stream = streamObject({ ...long, schema: Zone });
  for await (const _ of stream.partialObjectStream);
  assert.ok(["UTC", "CET"].includes((await stream.object).zone));
});

test("a forced tool call", async () => {
  const answer = await generateText(forced);
  assert.equal(answer.finishReason, "tool-calls");
  assert.equal(answer.toolCalls[0].toolName, "clock");
  assert.ok(["UTC", "CET"].includes(answer.toolCalls[0].input.zone));
});

test("a streamed tool call", async () => {
  const calls = [];
  for await (const part of streamText(forced).fullStream) {
    if (part.type === "error") throw part.error;
    if (part.type === "tool-call") calls.push(part);
  }
  assert.ok(["UTC", "CET"].includes(calls[0].input.zone));
});

test("the server's words about an error are shown", async () => {
  const stranger = createOpenAICompatible({ ...settings, apiKey: "sk-wrong" })(process.env.MODEL);
  await assert.rejects(generateText({ ...short, model: stranger }), (error) => {
    assert.equal(error.statusCode, 401);
    assert.match(error.message, /key/i);
    return true;
  });
  const nobody = createOpenAICompatible(settings)("nobody");
  await assert.rejects(generateText({ ...short, model: nobody }), /The model 'nobody' does not exist/);
});

test("the snippet", () => {
  assert.ok(execFileSync(process.execPath, ["snippet.mjs"], { encoding: "utf8", timeout: 60_000 }).trim());
});
