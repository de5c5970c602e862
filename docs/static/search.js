// The search needs each word to be on a page. What stands in quotes in an error is the reader's own
// (a path, a pattern) and is on none, so a message that was pasted is searched for without it.
document.addEventListener("submit", (event) => {
  const field = event.target.querySelector?.("input[name=q]");
  if (!field) return;
  // Not from the apostrophe of one word ("can't") to that of another.
  const others = field.value.replace(/(?<!\w)['"“‘].*?['"”’](?!\w)/g, " ").trim();
  if (others) field.value = others;
});
