//! The pre-tokenizers that `tokenizer.ggml.pre` names, as `tokenizer.json` states them.

use serde_json::{Value, json};

/// How a text is split before merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Each digit by itself.
    Digits,
    /// The expression of GPT-2.
    Gpt2,
    /// The matches of an expression, and what lies between them.
    Regex(&'static str),
}

/// A pre-tokenizer of byte-level BPE.
pub(crate) struct Pre {
    /// Its names in GGUF, of which the first is written.
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether texts are normalized to NFC.
    nfc: bool,
    /// Whether a word that is a token is not merged.
    pub(crate) ignore_merges: bool,
    /// Whether a text begins with the token that begins texts, unless the file says otherwise.
    pub(crate) adds_bos: bool,
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The pre-tokenizers of this crate: those whose expressions are the same in llama.cpp and in the
/// `tokenizer.json` of the models.
const ALL: [Pre; 5] = [
    Pre {
        names: &["gpt-2", "phi-2", "mpt", "olmo"],
        steps: &[Step::Gpt2],
        nfc: false,
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        steps: &[Step::Digits, Step::Gpt2],
        nfc: false,
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        steps: &[Step::Regex(LLAMA3)],
        nfc: false,
        ignore_merges: true,
        adds_bos: true,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen"],
        steps: &[Step::Regex(QWEN2)],
        nfc: true,
        ignore_merges: false,
        adds_bos: false,
    },
    Pre {
        names: &["tekken"],
        steps: &[Step::Regex(TEKKEN)],
        nfc: false,
        ignore_merges: true,
        adds_bos: true,
    },
];

impl Pre {
    /// The pre-tokenizer of a name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|pre| pre.names.contains(&name))
    }

    /// The names of all pre-tokenizers.
    pub(crate) fn all_names() -> String {
        let names: Vec<&str> = ALL.iter().flat_map(|pre| pre.names).copied().collect();
        names.join(", ")
    }

    pub(crate) fn name(&self) -> &'static str {
        self.names[0]
    }

    /// The `normalizer` of a `tokenizer.json`.
    pub(crate) fn normalizer(&self) -> Value {
        if self.nfc {
            json!({"type": "NFC"})
        } else {
            Value::Null
        }
    }

    /// The `pre_tokenizer` of a `tokenizer.json`.
    pub(crate) fn pre_tokenizer(&self) -> Value {
        let bytes = |use_regex: bool| {
            json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let mut steps: Vec<Value> = Vec::new();
        for step in self.steps {
            steps.push(match step {
                Step::Digits => json!({"type": "Digits", "individual_digits": true}),
                Step::Gpt2 => bytes(true),
                Step::Regex(regex) => json!({
                    "type": "Split",
                    "pattern": {"Regex": regex},
                    "behavior": "Isolated",
                    "invert": false,
                }),
            });
        }
        if self.steps.last() != Some(&Step::Gpt2) {
            steps.push(bytes(false));
        }
        match &steps[..] {
            [one] => one.clone(),
            _ => json!({"type": "Sequence", "pretokenizers": steps}),
        }
    }

    /// The pre-tokenizer of a `tokenizer.json`, if it is one of them.
    pub(crate) fn of(tokenizer: &Value) -> Option<&'static Self> {
        let normalizer = &tokenizer["normalizer"];
        ALL.iter().find(|pre| {
            let pre_tokenizer = &tokenizer["pre_tokenizer"];
            let found = simplified(pre_tokenizer);
            found.is_some()
                && found == simplified(&pre.pre_tokenizer())
                && simplified_normalizer(normalizer) == simplified_normalizer(&pre.normalizer())
        })
    }
}

/// The steps of a pre-tokenizer by what decides about tokens: not offsets, nor defaults that may be left
/// out. `None` for one that has other steps.
fn simplified(pre_tokenizer: &Value) -> Option<Vec<String>> {
    let kind = pre_tokenizer["type"].as_str()?;
    let flag = |name: &str| pre_tokenizer[name].as_bool();
    match kind {
        "Sequence" => {
            let steps = pre_tokenizer["pretokenizers"].as_array()?;
            let steps: Option<Vec<_>> = steps.iter().map(simplified).collect();
            Some(steps?.concat())
        }
        "Digits" if flag("individual_digits") == Some(true) => Some(vec!["digits".into()]),
        "ByteLevel" if flag("add_prefix_space") == Some(false) => {
            let regex = flag("use_regex").unwrap_or(true);
            Some(vec![format!("bytes {regex}")])
        }
        "Split" if flag("invert") != Some(true) => {
            let regex = pre_tokenizer["pattern"]["Regex"].as_str()?;
            let behavior = pre_tokenizer["behavior"].as_str()?;
            Some(vec![format!("{behavior} {regex}")])
        }
        _ => None,
    }
}

fn simplified_normalizer(normalizer: &Value) -> Option<String> {
    match normalizer {
        Value::Null => Some(String::new()),
        _ => normalizer["type"].as_str().map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pre_tokenizer_is_found_by_what_it_states() {
        for pre in &ALL {
            let tokenizer = json!({
                "normalizer": pre.normalizer(),
                "pre_tokenizer": pre.pre_tokenizer(),
            });
            let found = Pre::of(&tokenizer).map(|pre| pre.name());
            assert_eq!(found, Some(pre.name()));
            assert!(Pre::named(pre.name()).is_some());
        }
        let other = json!({"pre_tokenizer": {"type": "Whitespace"}});
        assert!(Pre::of(&other).is_none());
        assert!(Pre::of(&json!({})).is_none());
    }
}
