//! Bits chosen by the loss against the uniform format of the same size, on trained models.

use std::path::Path;

use burn::tensor::Device;
use evaluate::window_losses;
use models::{Model, load, quantize, quantize_within};
use peft::{Batch, Linears};
use quant_core::{Optq, Quantizer};

/// The losses on held-out windows, of the model quantized within the bytes of a width minus those of the
/// model quantized to that width.
fn differences(dense: &Model, bits: usize, calibration: &[Batch], held_out: &[Batch]) -> Vec<f64> {
    let optq = |bits| Optq::new().with_bits(bits).with_group_size(32);
    let widths = [2, 3, 4, 8].map(optq);
    let quantizers: Vec<&dyn Quantizer> = widths.iter().map(|optq| optq as _).collect();
    let mut uniform = dense.clone();
    let layers = quantize(&mut uniform, &optq(bits), calibration, |_| {}).unwrap();
    let budget: usize = layers.iter().map(|layer| layer.n_bytes).sum();
    let mut packed = dense.clone();
    let done = quantize_within(&mut packed, &quantizers, calibration, budget as u64, |_| {});
    let done = done.unwrap();
    let n_bytes: usize = packed
        .linears()
        .iter()
        .map(|(_, linear)| linear.weight().n_bytes())
        .sum();
    assert!(n_bytes <= budget);
    assert!(done.best().measured <= done.uniform.as_ref().unwrap().measured);
    let [uniform, packed] = [uniform, packed].map(|model| window_losses(&model, held_out).unwrap());
    packed
        .iter()
        .zip(uniform)
        .map(|(loss, other)| loss - other)
        .collect()
}

/// The mean, and its standard error.
fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean).powi(2));
    (mean, (squares.sum::<f64>() / (n * (n - 1.0))).sqrt())
}

/// On held-out windows, never worse than uniform beyond the noise, and better where 3 bits cost much.
#[test]
#[ignore = "needs ../shared"]
fn bits_chosen_by_the_loss_are_no_worse_than_uniform() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let read = |file: &str| std::fs::read_to_string(data.join(file)).unwrap();
    let stories = read("tinystories/dev_half.txt");
    let book = read("books/sherlock.txt");
    let (held_out, in_style) = (&stories[..60_000], &stories[400_000..700_000]);
    let wiki = read("wikitext-2/valid.txt");
    let mixed = read("models/mini/heldout.txt");
    let cases = [
        (
            "stories260K",
            Some(0.01),
            &[3, 4][..],
            held_out,
            [in_style, &book[..300_000]],
        ),
        (
            "babyllama-361",
            Some(0.01),
            &[3, 4],
            held_out,
            [in_style, &book[..300_000]],
        ),
        (
            "mini-llama",
            None,
            &[3],
            &mixed[..60_000],
            [&wiki[..300_000], in_style],
        ),
    ];
    for (name, gain, widths, held_out, texts) in cases {
        let device = Device::flex();
        let lm = load(data.join("models").join(name), &device).unwrap();
        let held_out = lm.windows(held_out, 256).unwrap().batches(4, &device);
        for (at, text) in texts.into_iter().enumerate() {
            // As long as those that are held out: errors at later positions count too.
            let calibration = lm.windows(text, 256).unwrap().shuffled(0).take(64);
            let calibration = calibration.batches(4, &device);
            for &bits in widths {
                let differences = differences(&lm.model, bits, &calibration, &held_out);
                let (mean, error) = mean(&differences);
                let named = format!("{name}, text {at}, {bits} bits: {mean} ± {error}");
                assert!(mean <= 2.0 * error, "{named}");
                if let Some(gain) = gain.filter(|_| (at, bits) == (0, 3)) {
                    assert!(mean < -gain, "{named}");
                }
            }
        }
    }
}
