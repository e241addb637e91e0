//! Compares allocations of bits with the uniform format of the same size.
//!
//! `allocation MODEL CALIBRATION EVAL SEQ_LEN N_CALIBRATION N_EVAL`: a Hugging Face directory, two files of
//! text, tokens of a window, and windows of either text. The first windows of `EVAL` and, shuffled, those
//! of `CALIBRATION` are used; the files should not overlap.
//!
//! At the bytes of 3 and 4 bits in groups of 32, OPTQ quantizes the model uniformly, by the least sum of
//! the squared errors of outputs, and by the least loss ([`models::quantize_within`]).

#![expect(clippy::print_stdout, reason = "a program reports its results")]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use burn::tensor::Device;
use evaluate::window_losses;
use models::{Assignment, Model, quantize, quantize_within};
use peft::{Batch, CausalLm, Linears, PerLayer, Streams, Weight};
use quant_core::{Candidate, Needs, Optq, Quantizer, allocate};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const BITS: [usize; 4] = [2, 3, 4, 8];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, calibration, eval, sizes @ ..] = &args[..] else {
        return Err("allocation MODEL CALIBRATION EVAL SEQ_LEN N_CALIBRATION N_EVAL".into());
    };
    let sizes = sizes.iter().map(|size| size.parse());
    let [seq_len, n_calibration, n_eval] =
        sizes.collect::<std::result::Result<Vec<usize>, _>>()?[..]
    else {
        return Err("three sizes: SEQ_LEN N_CALIBRATION N_EVAL".into());
    };
    let device = Device::flex();
    let lm = models::load(dir, &device)?;
    let windows =
        |file: &str| -> Result<_> { Ok(lm.windows(&std::fs::read_to_string(file)?, seq_len)?) };
    let per_batch = (1024 / seq_len).max(1);
    let calibration = windows(calibration)?.shuffled(0).take(n_calibration);
    let calibration = calibration.batches(per_batch, &device);
    let eval = windows(eval)?.take(n_eval).batches(per_batch, &device);

    let name = Path::new(dir).file_name().unwrap_or_default().display();
    println!("{name}, calibrated on {}", args[1]);
    println!("| | bits | predicted | measured | held out | against uniform | seconds |");
    println!("|---|---|---:|---:|---:|---:|---:|");
    let dense = window_losses(&lm.model, &eval)?;
    let on_calibration = mean(&window_losses(&lm.model, &calibration)?);
    println!(
        "| dense | 32 | | {on_calibration:.4} | {:.4} | | |",
        mean(&dense)
    );
    let widths = BITS.map(|bits| Optq::new().with_bits(bits).with_group_size(32));
    let quantizers: Vec<&dyn Quantizer> = widths.iter().map(|optq| optq as _).collect();
    for uniform in [1, 2] {
        let clock = Instant::now();
        let mut packed = lm.model.clone();
        quantize(&mut packed, &widths[uniform], &calibration, |_| {})?;
        let row = Row {
            name: "uniform",
            bits: vec![uniform; lm.model.linears().len()],
            predicted: None,
            seconds: clock.elapsed().as_secs_f64(),
        };
        let reference = window_losses(&packed, &eval)?;
        row.print(&packed, &calibration, &reference, &reference)?;
        let n_bytes = |(_, linear): (String, &peft::Linear)| {
            widths[uniform].format()?.n_bytes(linear.weight().dims())
        };
        let sizes = lm.model.linears().into_iter().map(n_bytes);
        let budget = sizes.sum::<quant_core::Result<u64>>()?;

        let clock = Instant::now();
        let (paths, errors) = output_errors(&lm.model, &quantizers, &calibration)?;
        let choice = allocate(&errors, budget)?.choice;
        let mut recipe = PerLayer::default();
        for (path, &at) in paths.into_iter().zip(&choice) {
            recipe.0.insert(path, Box::new(widths[at]));
        }
        let mut packed = lm.model.clone();
        quantize(&mut packed, &recipe, &calibration, |_| {})?;
        let row = Row {
            name: "errors of outputs",
            bits: choice,
            predicted: None,
            seconds: clock.elapsed().as_secs_f64(),
        };
        row.print(
            &packed,
            &calibration,
            &window_losses(&packed, &eval)?,
            &reference,
        )?;

        let clock = Instant::now();
        let mut packed = lm.model.clone();
        let done = quantize_within(&mut packed, &quantizers, &calibration, budget, |_| {})?;
        let Assignment {
            choice, predicted, ..
        } = done.best();
        let row = Row {
            name: if done.is_uniform() {
                "loss: uniform"
            } else {
                "loss"
            },
            bits: choice.clone(),
            predicted: Some(*predicted),
            seconds: clock.elapsed().as_secs_f64(),
        };
        row.print(
            &packed,
            &calibration,
            &window_losses(&packed, &eval)?,
            &reference,
        )?;
    }
    Ok(())
}

struct Row {
    name: &'static str,
    bits: Vec<usize>,
    predicted: Option<f64>,
    seconds: f64,
}

impl Row {
    fn print(
        self,
        model: &impl CausalLm,
        calibration: &[Batch],
        losses: &[f64],
        reference: &[f64],
    ) -> Result<()> {
        let counts = BITS.iter().enumerate().filter_map(|(at, bits)| {
            let n = self.bits.iter().filter(|&&chosen| chosen == at).count();
            (n > 0).then(|| format!("{n} of {bits}"))
        });
        let counts: Vec<String> = counts.collect();
        let predicted = self
            .predicted
            .map_or(String::new(), |loss| format!("{loss:.4}"));
        let differences = losses
            .iter()
            .zip(reference)
            .map(|(loss, other)| loss - other);
        let differences: Vec<f64> = differences.collect();
        println!(
            "| {} | {} | {predicted} | {:.4} | {:.4} | {:+.4} ± {:.4} | {:.0} |",
            self.name,
            counts.join(", "),
            mean(&window_losses(model, calibration)?),
            mean(losses),
            mean(&differences),
            standard_error(&differences),
            self.seconds,
        );
        Ok(())
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn standard_error(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares = values.iter().map(|value| (value - mean).powi(2));
    (squares.sum::<f64>() / (values.len() * (values.len() - 1)) as f64).sqrt()
}

/// `‖X (W - Ŵ)‖²` of each layer with each quantizer.
fn output_errors(
    model: &Model,
    quantizers: &[&dyn Quantizer],
    calibration: &[Batch],
) -> Result<(Vec<String>, Vec<Vec<Candidate>>)> {
    let mut all = (Vec::new(), Vec::new());
    let mut streams = Streams::start(model, calibration, Needs::Gram);
    while let Some(stage) = streams.next_stage(model) {
        let gram = stage.gram.ok_or("no calibration")?;
        for (path, linear) in &model.linears()[stage.layers] {
            let Weight::Dense(weight) = linear.weight() else {
                return Err("the model is quantized already".into());
            };
            let mut candidates = Vec::new();
            for quantizer in quantizers {
                let packed = quantizer.quantize(weight.val(), Some(&gram))?.weight;
                candidates.push(Candidate {
                    n_bytes: packed.n_bytes() as u64,
                    error: gram.energy(packed.dequantize() - weight.val()).max(0.0),
                });
            }
            all.0.push(path.clone());
            all.1.push(candidates);
        }
    }
    Ok(all)
}
