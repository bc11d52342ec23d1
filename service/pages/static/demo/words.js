/** Says which words of a prompt a model was not trained on. */

/**
 * List the words of a prompt that the model does not know, each once; none if it takes any text. Words of no kind, such
 * as "a" and "on", are known from the template and the examples.
 *
 * @param {string} prompt @param {Record<string, any>} offer one of `GET /models` @returns {string[]}
 */
export function unknownWords(prompt, offer) {
  if (offer.vocabulary.length === 0) return [];
  const wordsOf = (/** @type {string} */ text) => text.toLowerCase().match(/[\p{L}\p{N}-]+/gu) ?? [];
  const phrases = offer.vocabulary.flatMap((/** @type {{phrases: string[]}} */ group) => group.phrases);
  const template = (offer.prompt_template ?? "").replace(/\b\p{Lu}{2,}\b/gu, " ");
  const known = new Set([...phrases, template, ...offer.example_prompts].flatMap(wordsOf));
  return [...new Set(wordsOf(prompt).filter((word) => !known.has(word)))];
}
