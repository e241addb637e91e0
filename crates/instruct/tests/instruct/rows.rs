//! Rows that make no batch.

use burn::tensor::Device;
use instruct::{Error, Row, batch};

#[test]
fn rows_without_targets_are_refused() {
    let error = batch(&[], &Device::flex()).unwrap_err();
    let is_empty = matches!(error, Error::Peft(peft::Error::EmptyBatch { batch: 0, .. }));
    assert!(is_empty, "{error}");
    let row = |is_target: [bool; 4], n_text| Row {
        tokens: vec![1, 2, 3, 0],
        is_target: is_target.to_vec(),
        starts: vec![0, 0, 0, 3],
        n_text,
    };
    for row in [row([false; 4], 3), row([true, false, false, false], 3)] {
        let error = batch(&[row], &Device::flex()).unwrap_err();
        let is_said = matches!(error, Error::Peft(peft::Error::NoTargets { .. }));
        assert!(is_said, "{error}");
    }
    // Padding is no target, whatever its mark, and does not begin within a text.
    let all = batch(&[row([true; 4], 3)], &Device::flex()).unwrap();
    assert_eq!(all.targets(), [true, true, false]);
    let error = batch(&[row([true; 4], 2)], &Device::flex()).unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::Spans { .. })),
        "{error}"
    );
}
