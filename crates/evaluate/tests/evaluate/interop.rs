//! The figures of lm-evaluation-harness, when it evaluates the same directories.
//!
//! Needs Python with lm_eval 0.4.13 and its `hf` extra: the one that `INTEROP_PYTHON` names, or `python3`.
//! `INTEROP_MODELS` names further directories, separated as those of `PATH`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::Device;
use evaluate::{
    AddBos, Bootstrap, ChoiceItem, Estimate, bits_per_byte, byte_perplexity, choices, gsm8k,
    word_losses, word_perplexity,
};
use models::{Pretrained, load};
use serde::Deserialize;
use serde_json::json;

const DOCUMENTS: [&str; 8] = [
    "Once upon a time, there was a little girl named Lily. She liked to play.",
    "One day  a dog\nran to the park.\n",
    " leading space, é and 🙂",
    "<s>stated",
    "x",
    "</s>",
    "\u{3000}日本語 \u{200b}",
    "Albena was a small town by the sea, and every morning the boats went out.",
];

const MAX_NEW_TOKENS: usize = 24;

#[derive(Deserialize)]
struct Harness {
    documents: Likelihoods<f64>,
    add_bos_token: Likelihoods<f64>,
    no_bos_token: Likelihoods<f64>,
    choices: Likelihoods<Vec<f64>>,
    problems: Generated,
}

#[derive(Deserialize)]
struct Likelihoods<T> {
    metrics: serde_json::Map<String, serde_json::Value>,
    log_likelihoods: Vec<T>,
}

#[derive(Deserialize)]
struct Generated {
    metrics: serde_json::Map<String, serde_json::Value>,
    texts: Vec<String>,
}

fn items() -> Vec<ChoiceItem> {
    let item = |context: &str, choices: &[&str], answer| ChoiceItem {
        context: context.into(),
        choices: choices.iter().map(|choice| (*choice).into()).collect(),
        answer,
    };
    vec![
        item(
            "Once upon a time",
            &["there was a girl", "a dog", "the cat sat"],
            0,
        ),
        item("The sky is  ", &["blue", "green and very large"], 0),
        item("", &["one", "two three"], 1),
        item(
            "Lily had a",
            &["n apple", " red ball and a blue ball", "é"],
            2,
        ),
    ]
}

fn problem(question: &str, answer: &str) -> gsm8k::Problem {
    let (question, answer) = (question.into(), answer.into());
    gsm8k::Problem { question, answer }
}

/// Directories of models: the embedded one of the examples, and those that the environment names.
fn directories() -> Vec<PathBuf> {
    let embedded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/data/llama");
    let more = env::var_os("INTEROP_MODELS").unwrap_or_default();
    let more = env::split_paths(&more).filter(|path| path != Path::new(""));
    [embedded].into_iter().chain(more).collect()
}

fn harness(dir: &Path, shots: &[gsm8k::Problem], problems: &[gsm8k::Problem]) -> Harness {
    let scratch = tempfile::tempdir().unwrap();
    let data = scratch.path().join("data.json");
    let items: Vec<_> = (items().into_iter())
        .map(
            |item| json!({"context": item.context, "choices": item.choices, "answer": item.answer}),
        )
        .collect();
    let json = json!({"documents": DOCUMENTS, "choices": items, "shots": shots, "problems": problems,
        "max_new_tokens": MAX_NEW_TOKENS});
    fs::write(&data, json.to_string()).unwrap();
    let python = env::var_os("INTEROP_PYTHON").unwrap_or("python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/harness.py");
    let output = Command::new(python)
        .arg(script)
        .arg(dir)
        .arg(data)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap()
}

#[track_caller]
fn assert_near(found: f64, expected: f64, what: &str) {
    let off = (found - expected).abs();
    assert!(
        off <= 1e-5 * expected.abs() + 1e-6,
        "{what}: {found}, not {expected}"
    );
}

fn check_documents(lm: &Pretrained, add_bos: AddBos, expected: &Likelihoods<f64>) {
    let found = word_losses(lm, &DOCUMENTS, add_bos).unwrap();
    assert_eq!(found.len(), expected.log_likelihoods.len());
    let pairs = found.iter().zip(&expected.log_likelihoods);
    for ((found, &expected), text) in pairs.zip(DOCUMENTS) {
        assert_near(
            found.log_likelihood,
            expected,
            &format!("{add_bos:?}, {text:?}"),
        );
    }
    let bootstrap = Bootstrap::new();
    let metrics: [(&str, evaluate::Result<Estimate>); 3] = [
        ("word_perplexity,none", word_perplexity(&found, &bootstrap)),
        ("byte_perplexity,none", byte_perplexity(&found, &bootstrap)),
        ("bits_per_byte,none", bits_per_byte(&found, &bootstrap)),
    ];
    for (name, found) in metrics {
        let expected = expected.metrics[name].as_f64().unwrap();
        assert_near(
            found.unwrap().value,
            expected,
            &format!("{add_bos:?}, {name}"),
        );
    }
}

#[test]
#[ignore = "needs Python with lm_eval"]
fn figures_are_those_of_the_harness() {
    for dir in directories() {
        let lm = load(&dir, &Device::flex()).unwrap();
        let shots = [problem("How many?", "It is 3.\n#### 3")];
        let problems = [
            problem("One and one?", "#### 2"),
            problem("Lily had 2 apples and found 3. How many has she?", "#### 5"),
        ];
        let answers = gsm8k::answers(&lm, &shots, &problems, MAX_NEW_TOKENS, |_| {}).unwrap();
        let expected = harness(&dir, &shots, &problems);
        check_documents(&lm, AddBos::AsTokenizer, &expected.documents);
        check_documents(&lm, AddBos::Always, &expected.add_bos_token);
        check_documents(&lm, AddBos::Never, &expected.no_bos_token);

        let scores = choices(&lm, &items()).unwrap();
        for (score, sums) in scores.iter().zip(&expected.choices.log_likelihoods) {
            let total: f64 = sums.iter().map(|sum| sum.exp()).sum();
            for (found, sum) in score.probabilities.iter().zip(sums) {
                assert_near(*found, sum.exp() / total, "a choice");
            }
        }
        let share = |right: &dyn Fn(usize) -> bool, n: usize| {
            (0..n).filter(|&at| right(at)).count() as f64 / n as f64
        };
        let n = scores.len();
        let metrics = &expected.choices.metrics;
        assert_eq!(share(&|at| scores[at].is_correct, n), metrics["acc,none"]);
        assert_eq!(
            share(&|at| scores[at].is_correct_norm, n),
            metrics["acc_norm,none"]
        );

        let texts: Vec<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        assert_eq!(texts, expected.problems.texts, "{dir:?}");
        let n = answers.len();
        let metrics = &expected.problems.metrics;
        assert_eq!(
            share(&|at| answers[at].strict, n),
            metrics["exact_match,strict-match"]
        );
        assert_eq!(
            share(&|at| answers[at].flexible, n),
            metrics["exact_match,flexible-extract"]
        );
    }
}
