// The dialog that shows a new key, once: when it closes, the page has forgotten it.

const dialog = document.querySelector("#secret");
const text = document.querySelector("#secret-text");
const copy = document.querySelector("#secret-copy");

copy.addEventListener("click", async () => {
  text.select();
  try {
    await navigator.clipboard.writeText(text.value);
  } catch { // not allowed, or the page did not come over a safe line
    document.execCommand("copy");
  }
  copy.textContent = "Copied";
});
document.querySelector("#secret-close").addEventListener("click", () => {
  text.value = ""; // at once: the event "close" comes when the browser finds time
  dialog.close();
});

export function showSecret(key) {
  text.value = key;
  copy.textContent = "Copy";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => {
    text.value = "";
    done();
  }, { once: true }));
}
