llm keys set toptwo --value "$OPENAI_API_KEY"
cat > "$(dirname "$(llm logs path)")/extra-openai-models.yaml" <<END
- model_id: toptwo
  model_name: $MODEL
  api_base: $OPENAI_BASE_URL
  api_key_name: toptwo
  supports_schema: true
  supports_tools: true
END
llm -m toptwo -o max_tokens 64 "Why is the sky blue?"
