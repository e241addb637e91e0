//! A classifier of one's own, quantized, tuned and merged: an MLP, a classification loss, and burn's
//! optimizer in a loop.
//!
//! The MLP learns to tell four clusters of points apart. It is quantized to 2 bits; then the clusters
//! move, and adapters learn where to. What is merged is recorded by burn, and loaded again.

use std::error::Error;
use std::iter::successors;
use std::process::ExitCode;

use burn::module::Module;
use burn::nn::LinearConfig;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft::{Adapters, Formats, Linear, Linears, Lora, Method, OffGrid, Peqa, Tile};
use quant_core::Rtn;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, Normal};

const INPUTS: usize = 32;
const HIDDEN: usize = 64;
const CLASSES: usize = 4;
/// Inputs that share a scale, and a tile of QA-LoRA.
const GROUP: usize = 8;

/// A burn module whose projections are [`peft::Linear`].
#[derive(Module, Debug)]
struct Mlp {
    up: Linear,
    down: Linear,
}

/// All that a model implements to be quantized, adapted and merged.
impl Linears for Mlp {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("up".into(), &self.up), ("down".into(), &self.down)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("up".into(), &mut self.up), ("down".into(), &mut self.down)]
    }
}

impl Mlp {
    fn new(device: &Device) -> Self {
        let linear = |d_in, d_out| Linear::from_burn(LinearConfig::new(d_in, d_out).init(device));
        Self {
            up: linear(INPUTS, HIDDEN),
            down: linear(HIDDEN, CLASSES),
        }
    }

    /// Returns logits `[batch, CLASSES]` for points `[batch, INPUTS]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(relu(self.up.forward(x)))
    }

    /// Trains the parameters that are not frozen, with AdamW.
    fn fit(self, points: &Points, learning_rate: f64, steps: usize) -> Self {
        let mut model = self.train();
        let mut optimizer = AdamWConfig::new().init();
        let device = points.x.device().autodiff();
        let loss = CrossEntropyLossConfig::new().init(&device);
        for _ in 0..steps {
            let logits = model.forward(points.x.clone().autodiff());
            let gradients = loss
                .forward(logits, points.classes.clone().autodiff())
                .backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(learning_rate, model, gradients);
        }
        model.valid()
    }

    /// Returns the share of points that are classified correctly, in percent.
    fn accuracy(&self, points: &Points) -> f32 {
        let classes = self.forward(points.x.clone()).argmax(1).squeeze_dim(1);
        let correct = classes.equal(points.classes.clone()).float();
        100.0 * correct.mean().into_scalar::<f32>()
    }
}

/// Points `[n, INPUTS]` and their classes `[n]`.
struct Points {
    x: Tensor<2>,
    classes: Tensor<1, Int>,
}

impl Points {
    /// Draws points around centers, one for each class, which `shift` moves.
    fn new(n: usize, shift: f32, seed: u64, device: &Device) -> Self {
        let normal = Normal::new(0f32, 1.0).expect("a positive deviation");
        let draw = |rng: &mut ChaCha8Rng, n: usize| -> Vec<f32> {
            (0..n).map(|_| normal.sample(rng)).collect()
        };
        let mut of_centers = ChaCha8Rng::seed_from_u64(0);
        let centers = draw(&mut of_centers, CLASSES * INPUTS);
        let shifts = draw(&mut of_centers, CLASSES * INPUTS);
        let noise = draw(&mut ChaCha8Rng::seed_from_u64(seed), n * INPUTS);
        let values = noise.iter().enumerate().map(|(at, noise)| {
            let center = at / INPUTS % CLASSES * INPUTS + at % INPUTS;
            centers[center] + shift * shifts[center] + 2.0 * noise
        });
        let values = TensorData::new(values.collect::<Vec<f32>>(), [n, INPUTS]);
        let classes: Vec<i32> = (0..n).map(|at| (at % CLASSES) as i32).collect();
        Self {
            x: Tensor::from_data(values, device),
            classes: Tensor::from_data(&classes[..], device),
        }
    }
}

fn main() -> ExitCode {
    let Err(error) = run() else {
        return ExitCode::SUCCESS;
    };
    eprintln!("error: {error}");
    for cause in successors(error.source(), |&error| error.source()) {
        eprintln!("  {cause}");
    }
    ExitCode::FAILURE
}

fn run() -> Result<(), Box<dyn Error>> {
    let device = Device::flex();
    device.seed(0);
    let points = |shift, seed| Points::new(1000, shift, seed, &device);
    let (before, moved, held_out) = (points(0.0, 1), points(1.5, 2), points(1.5, 3));

    let dense = Mlp::new(&device).unfreeze().fit(&before, 1e-2, 100);
    let mut base = dense.no_grad();
    println!(
        "dense: {:.1} % of the points it knows",
        base.accuracy(&before)
    );
    for (path, linear) in base.linears_mut() {
        let report =
            linear.quantize(&path, &Rtn::new().with_bits(2).with_group_size(GROUP), None)?;
        println!("{path}: {}", report.error);
    }
    println!(
        "2 bits: {:.1} %; moved: {:.1} %",
        base.accuracy(&before),
        base.accuracy(&held_out)
    );

    let methods: [(&dyn Method, OffGrid); 3] = [
        (&Peqa::new().with_zeros(true), OffGrid::Refuse),
        (&Tile::qa_lora(2).with_pool(GROUP), OffGrid::Refuse),
        // The codes of a packed weight do not hold the sum with a matrix of low rank.
        (&Lora::new(2), OffGrid::Dense),
    ];
    for (method, off_grid) in methods {
        let mut model = base.clone();
        let attached = peft::attach(&mut model, method)?;
        let mut tuned = model.fit(&moved, 1e-2, 200);
        let accuracy = tuned.accuracy(&held_out);
        let adapters = Adapters::of(&tuned)?;
        let certificate = peft::merge_with(&mut tuned, off_grid)?;
        let merged = tuned.accuracy(&held_out);
        println!(
            "\n{} trained: {accuracy:.1} % of the moved points, merged {merged:.1} %",
            attached.n_trainable
        );
        println!("{certificate}");

        // The certificate accepts the merged model and refuses the base.
        let mut again = base.clone();
        peft::activate(&mut again, &adapters)?;
        peft::merge_with(&mut again, off_grid)?;
        certificate.verify(&again)?;
        assert!(certificate.verify(&base).is_err());

        // A record has the parameters, and the formats say which weights are packed. Both can be files.
        let formats = Formats::of(&tuned);
        let bytes = tuned.into_record().into_bytes()?;
        let record = ModuleRecord::from_bytes(bytes)?;
        certificate.verify(&formats.load_record(Mlp::new(&device), record)?)?;
    }
    Ok(())
}
