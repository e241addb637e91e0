use approx::assert_relative_eq;
use proptest::prelude::*;

use super::*;

const BOS: u32 = 1000;

/// The tokens read and predicted in each window, by the slices of `lm_eval/utils.py`.
fn reference(tokens: &[u32], prefix: u32, max_len: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    if tokens.is_empty() {
        return Vec::new();
    }
    let first = max_len.min(tokens.len());
    let input = [&[prefix], &tokens[..first - 1]].concat();
    let mut windows = vec![(input, tokens[..first].to_vec())];
    let mut predicted = first;
    while predicted < tokens.len() {
        let n = max_len.min(tokens.len() - predicted);
        let end = predicted + n;
        let input = tokens[end - max_len - 1..end - 1].to_vec();
        windows.push((input, tokens[end - n..end].to_vec()));
        predicted += n;
    }
    windows
}

fn read_and_predicted(window: &ScoredWindow) -> (Vec<u32>, Vec<u32>) {
    let read = &window.tokens[..window.tokens.len() - 1];
    (read.to_vec(), window.targets().to_vec())
}

#[test]
fn rolling_windows_of_the_harness_documentation() {
    // `lm_eval/api/model.py`, `loglikelihood_rolling`.
    let tokens: Vec<u32> = (0..10).collect();
    let windows = rolling_windows(&tokens, BOS, 4).unwrap();
    let found: Vec<_> = windows.iter().map(read_and_predicted).collect();
    let expected = [
        (vec![BOS, 0, 1, 2], vec![0, 1, 2, 3]),
        (vec![3, 4, 5, 6], vec![4, 5, 6, 7]),
        (vec![5, 6, 7, 8], vec![8, 9]),
    ];
    assert_eq!(found, expected);
    assert_eq!(windows[2].tokens, [5, 6, 7, 8, 9]);
    assert_eq!(
        (windows[2].scored.clone(), windows[2].losses()),
        (3..5, 2..4)
    );
}

#[test]
fn rolling_windows_at_the_edges() {
    assert_eq!(rolling_windows(&[], BOS, 4).unwrap(), []);
    let window = |tokens: &[u32], scored| ScoredWindow {
        tokens: tokens.to_vec(),
        scored,
    };
    assert_eq!(
        rolling_windows(&[7], BOS, 4).unwrap(),
        [window(&[BOS, 7], 1..2)]
    );
    let whole = [window(&[BOS, 7, 8, 9], 1..4)];
    assert_eq!(rolling_windows(&[7, 8, 9], BOS, 3).unwrap(), whole);
    assert_eq!(rolling_windows(&[7, 8, 9], BOS, usize::MAX).unwrap(), whole);
    let bigrams = [window(&[BOS, 7], 1..2), window(&[7, 8], 1..2)];
    assert_eq!(rolling_windows(&[7, 8], BOS, 1).unwrap(), bigrams);
    let message = rolling_windows(&[7], BOS, 0).unwrap_err().to_string();
    assert_eq!(message, "max_len is 0; it must be at least 1");
}

#[test]
fn llama_cpp_scores_the_second_half() {
    let tokens: Vec<u32> = (0..18).collect();
    let windows = llama_cpp_windows(&tokens, 8, Some(BOS)).unwrap();
    assert_eq!(windows.len(), 2);
    assert_eq!(windows[1].tokens, [BOS, 9, 10, 11, 12, 13, 14, 15]);
    // The outputs at 4, 5 and 6 predict the tokens at 5, 6 and 7.
    assert_eq!(windows[1].targets(), [13, 14, 15]);
    assert_eq!(windows[1].losses(), 4..7);
    let plain = llama_cpp_windows(&tokens, 9, None).unwrap();
    assert_eq!(plain[1].tokens, [9, 10, 11, 12, 13, 14, 15, 16, 17]);
    assert_eq!(plain[1].targets(), [14, 15, 16, 17]);
}

#[test]
fn llama_cpp_scores_255_of_512() {
    let windows = llama_cpp_windows(&[0; 512 * 3 - 1], 512, None).unwrap();
    let n_scored: Vec<usize> = windows.iter().map(|window| window.scored.len()).collect();
    assert_eq!(n_scored, [255, 255]);
    let error = llama_cpp_windows(&[0; 1023], 512, None).unwrap_err();
    assert!(matches!(
        error,
        Error::FewTokens {
            n_tokens: 1023,
            n_ctx: 512
        }
    ));
    assert!(error.to_string().contains("two windows of 512;"), "{error}");
    assert_eq!(llama_cpp_windows(&[5; 6], 3, None).unwrap()[0].scored, 2..3);
    assert!(matches!(
        llama_cpp_windows(&[5; 6], 2, None),
        Err(Error::Peft(peft::Error::Setting { .. }))
    ));
}

#[test]
fn a_long_context_loses_its_beginning() {
    let window = ScoredWindow::after(&[1, 2, 3, 4], &[5, 6], 4).unwrap();
    // Four tokens are read, 2 to 5, and 6 is predicted.
    assert_eq!(
        (&window.tokens[..], window.scored),
        (&[2, 3, 4, 5, 6][..], 3..5)
    );
    let window = ScoredWindow::after(&[1, 2], &[5, 6], 4).unwrap();
    assert_eq!(
        (&window.tokens[..], window.losses()),
        (&[1, 2, 5, 6][..], 1..3)
    );
    let full = ScoredWindow::after(&[1, 2], &[5, 6], 2).unwrap();
    assert_eq!(full.tokens, [2, 5, 6]);
    let long = ScoredWindow::after(&[1, 2], &[5, 6], 1);
    assert!(matches!(
        long,
        Err(Error::LongContinuation {
            n_tokens: 2,
            max_len: 1
        })
    ));
    let after = ScoredWindow::after;
    assert!(matches!(after(&[], &[5], 4), Err(Error::NoContext)));
    let none = after(&[1], &[], 4);
    assert!(matches!(none, Err(Error::NoContinuation { .. })));
}

#[test]
fn words_are_counted_as_python_splits() {
    // len(re.split(r"\s+", text)) in CPython 3.11.
    let cases = [
        ("", 1),
        (" ", 2),
        ("one", 1),
        ("one two", 2),
        ("  one \n\t two  ", 4),
        ("one\n", 2),
        ("no\u{a0}break", 2),
        ("zero\u{200b}width", 1),
        ("unit\u{1f}separator", 2),
        ("\u{feff}mark", 1),
    ];
    for (text, expected) in cases {
        assert_eq!(word_count(text), expected, "{text:?}");
    }
}

#[test]
fn perplexities_by_hand() {
    // Two documents: 3 words and 13 bytes, 1 word and 5 bytes.
    let documents = [
        ScoredDocument::new("one two süß", -6.0),
        ScoredDocument::new("three", -2.0),
    ];
    let lengths = documents.map(|document| (document.n_words, document.n_bytes));
    assert_eq!(lengths, [(3, 13), (1, 5)]);
    let bootstrap = Bootstrap::new();
    let words = word_perplexity(&documents, &bootstrap).unwrap();
    // Both have 2 nats a word.
    assert_relative_eq!(words.value, 2f64.exp(), max_relative = 1e-15);
    assert_eq!(
        (words.lower, words.upper, words.n),
        (words.value, words.value, 2)
    );
    let bytes = byte_perplexity(&documents, &bootstrap).unwrap();
    assert_relative_eq!(bytes.value, (8f64 / 18.0).exp(), max_relative = 1e-15);
    // The first document alone and the second alone.
    assert_relative_eq!(bytes.lower, (2f64 / 5.0).exp(), max_relative = 1e-15);
    assert_relative_eq!(bytes.upper, (6f64 / 13.0).exp(), max_relative = 1e-15);
    let bits = bits_per_byte(&documents, &bootstrap).unwrap();
    assert_relative_eq!(bits.value, bytes.value.log2(), max_relative = 1e-14);
    assert!(matches!(
        word_perplexity(&[], &bootstrap),
        Err(Error::NoItems)
    ));
    let empty = [ScoredDocument::new("", 0.0)];
    assert!(matches!(
        bits_per_byte(&empty, &bootstrap),
        Err(Error::Denominator { .. })
    ));
    assert_eq!(word_perplexity(&empty, &bootstrap).unwrap().value, 1.0);
}

proptest! {
    #[test]
    fn rolling_windows_are_those_of_the_harness(n in 0u32..200, max_len in 1usize..40) {
        let tokens: Vec<u32> = (0..n).collect();
        let windows = rolling_windows(&tokens, BOS, max_len).unwrap();
        let found: Vec<_> = windows.iter().map(read_and_predicted).collect();
        prop_assert_eq!(&found, &reference(&tokens, BOS, max_len));
        let predicted: Vec<u32> = found.iter().flat_map(|(_, predicted)| predicted.clone()).collect();
        prop_assert_eq!(predicted, tokens);
        for (read, predicted) in &found {
            prop_assert!(read.len() <= max_len && predicted.len() <= read.len());
        }
    }

    #[test]
    fn llama_cpp_windows_are_whole(n_tokens in 6usize..300, n_ctx in 3usize..40) {
        let tokens: Vec<u32> = (0..n_tokens as u32).collect();
        let Ok(windows) = llama_cpp_windows(&tokens, n_ctx, Some(BOS)) else {
            prop_assert!(n_tokens < 2 * n_ctx);
            return Ok(());
        };
        prop_assert_eq!(windows.len(), n_tokens / n_ctx);
        for (at, window) in windows.iter().enumerate() {
            prop_assert_eq!(window.tokens[0], BOS);
            prop_assert_eq!(&window.tokens[1..], &tokens[at * n_ctx + 1..(at + 1) * n_ctx]);
            prop_assert_eq!(window.scored.len(), n_ctx - n_ctx / 2 - 1);
        }
    }

    #[test]
    fn word_counts_do_not_depend_on_the_length_of_runs(words in prop::collection::vec("[a-zß]{1,5}", 1..20)) {
        prop_assert_eq!(word_count(&words.join(" ")), words.len());
        prop_assert_eq!(word_count(&words.join(" \n\u{2003}")), words.len());
    }
}
