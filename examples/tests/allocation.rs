//! Bits chosen by the loss against the uniform format of the same size, on the embedded model.
#![cfg(feature = "flex")]

use burn::tensor::Device;
use evaluate::window_losses;
use examples::corpus::{Dialect, text};
use examples::embedded::{self, Architecture};
use models::{quantize, quantize_within};
use quant_core::{Optq, Quantizer};

/// On held-out windows, at the bytes of 3 bits, never worse than uniform beyond the noise.
#[test]
fn bits_chosen_by_the_loss_are_no_worse_than_uniform() {
    let dir = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let lm = models::load(
        embedded::write(dir.path(), Architecture::Llama).unwrap(),
        &device,
    )
    .unwrap();
    let windows = |length, seed| {
        let text = text(Dialect::Plain, length, seed);
        lm.windows(&text, 128).unwrap().batches(8, &device)
    };
    let (calibration, held_out) = (windows(12_000, 20), windows(12_000, 12));
    let widths = [2, 3, 4].map(|bits| Optq::new().with_bits(bits).with_group_size(32));
    let quantizers: Vec<&dyn Quantizer> = widths.iter().map(|optq| optq as _).collect();
    let mut uniform = lm.model.clone();
    let layers = quantize(&mut uniform, &widths[1], &calibration, |_| {}).unwrap();
    let budget: usize = layers.iter().map(|layer| layer.n_bytes).sum();
    let mut packed = lm.model.clone();
    let done = quantize_within(
        &mut packed,
        &quantizers,
        &calibration,
        budget as u64,
        |_| {},
    );
    let done = done.unwrap();
    let same = done.uniform.as_ref().unwrap();
    assert!(done.best().n_bytes <= same.n_bytes && done.best().measured <= same.measured);
    // What is predicted is of the order of what is measured.
    let [predicted, measured] = [same.predicted, same.measured].map(|loss| loss - done.dense);
    let ratio = predicted / measured;
    assert!((0.3..3.0).contains(&ratio), "{predicted} for {measured}");

    let [uniform, packed] =
        [uniform, packed].map(|model| window_losses(&model, &held_out).unwrap());
    let differences = packed
        .iter()
        .zip(&uniform)
        .map(|(loss, other)| loss - other);
    let n = uniform.len() as f64;
    let mean = differences.clone().sum::<f64>() / n;
    let squares = differences.map(|difference| (difference - mean).powi(2));
    let error = (squares.sum::<f64>() / (n * (n - 1.0))).sqrt();
    assert!(mean <= 2.0 * error, "{mean} ± {error}");
}
