import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const toptwo = createOpenAICompatible({
  name: "toptwo",
  baseURL: process.env.OPENAI_BASE_URL,
  apiKey: process.env.OPENAI_API_KEY,
});
const { textStream } = streamText({ model: toptwo(process.env.MODEL), prompt: "Why is the sky blue?", maxOutputTokens: 64 });
for await (const text of textStream) process.stdout.write(text);
