//! The laws of every adapter, over every format, on a small language model.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use peft::{
    Adapter, Adapters, Batch, Bayesian, Blocks, CausalLm, Error, Exactness, Fingerprint, FitConfig,
    Head, Linear, Linears, Lora, Method, OffGrid, Peqa, Pooling, Schedule, Spans, Targets,
    TaskPack, Tasks, Tile, TileMethod, Weight, fit, token_nll,
};
use proptest::prelude::*;
use quant_core::{DoubleQuant, Grid, NormalFloat, Quantizer, Rtn};
use tensor_files::{FloatType, LazyTensor};

const VOCAB: usize = 11;
const HIDDEN: usize = 128;
const WIDTH: usize = 256;

/// Predicts a token from the one before it, in two blocks and with the embedding for a head.
#[derive(Module, Debug)]
struct Bigram {
    embedding: Param<Tensor<2>>,
    up: Linear,
    down: Linear,
}

impl Linears for Bigram {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("mlp.up".into(), &self.up), ("mlp.down".into(), &self.down)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![
            ("mlp.up".into(), &mut self.up),
            ("mlp.down".into(), &mut self.down),
        ]
    }
}

impl Blocks for Bigram {
    type Positions = ();

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn n_blocks(&self) -> usize {
        2
    }

    fn positions(&self, _: &Spans) {}

    fn embed(&self, tokens: Tensor<2, Int>, (): &()) -> Tensor<3> {
        let [batch, seq] = tokens.dims();
        let x = self
            .embedding
            .val()
            .select(0, tokens.reshape([batch * seq]));
        x.reshape([batch, seq, HIDDEN])
    }

    fn block(&self, index: usize, x: Tensor<3>, (): &()) -> Tensor<3> {
        match index {
            0 => silu(self.up.forward(x)),
            _ => self.down.forward(x),
        }
    }
}

impl CausalLm for Bigram {
    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        x
    }

    fn head(&self) -> Head<'_> {
        Head::Dense(self.embedding.val().transpose())
    }
}

/// Numbers that a seed makes, without a generator that tests would share.
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Of such a size that products keep the magnitude of their inputs.
fn tensor(seed: u64, dims: [usize; 2]) -> Tensor<2> {
    let values = TensorData::new(numbers(seed, dims[0] * dims[1]), dims);
    Tensor::<2>::from_data(values, &Device::flex()) * (3.0 / dims[0] as f32).sqrt()
}

fn dense(seed: u64) -> Bigram {
    let bias = Tensor::<1>::full([WIDTH], 0.1, &Device::flex());
    let bias = Param::from_tensor(bias).set_require_grad(false);
    Bigram {
        embedding: Param::from_tensor(tensor(seed, [VOCAB, HIDDEN])).set_require_grad(false),
        up: Linear::new(
            Weight::frozen(tensor(seed + 1, [HIDDEN, WIDTH])),
            Some(bias),
        ),
        down: Linear::new(Weight::frozen(tensor(seed + 2, [WIDTH, HIDDEN])), None),
    }
}

fn quantized(seed: u64, quantizer: &dyn Quantizer) -> Bigram {
    let mut model = dense(seed);
    for (path, linear) in model.linears_mut() {
        linear.quantize(&path, quantizer, None).unwrap();
    }
    model
}

fn batch(seed: u64, [n, seq]: [usize; 2]) -> Batch {
    let tokens = numbers(seed, n * seq)
        .into_iter()
        .map(|v| ((v + 1.0) * 1000.0) as i32 % VOCAB as i32);
    let tokens = TensorData::new(tokens.collect::<Vec<_>>(), [n, seq]);
    Batch::new(Tensor::from_data(tokens, &Device::flex())).unwrap()
}

fn logits(model: &Bigram) -> Vec<u32> {
    let logits = model.forward(batch(99, [2, 9]).tokens()).into_data();
    logits
        .try_into_vec::<f32>()
        .unwrap()
        .into_iter()
        .map(f32::to_bits)
        .collect()
}

/// Ten steps at a rate that moves every scale.
fn tune(model: &mut Bigram, seed: u64) {
    let batches: Vec<Batch> = (0..5).map(|at| batch(seed + at, [2, 9])).collect();
    let config = FitConfig::new()
        .with_learning_rate(0.02)
        .with_steps(Some(10))
        .with_seed(seed);
    fit(model, &batches, &config, |_| {}).unwrap();
}

/// What a layer is quantized to, if it is.
#[derive(Clone, Debug)]
enum Base {
    Dense,
    Rtn(Rtn),
    NormalFloat(NormalFloat),
}

impl Base {
    fn model(&self, seed: u64) -> Bigram {
        match self {
            Base::Dense => dense(seed),
            Base::Rtn(rtn) => quantized(seed, rtn),
            Base::NormalFloat(nf) => quantized(seed, nf),
        }
    }
}

/// Widths of codes, groups that divide, that leave a short one, and one per channel.
fn bases() -> impl Strategy<Value = Base> {
    let bits = prop::sample::select(vec![2, 3, 4, 8]);
    let group_size = prop::sample::select(vec![None, Some(32), Some(64), Some(128), Some(48)]);
    let rtn = (bits, group_size.clone(), prop::bool::weighted(0.25)).prop_map(
        |(bits, group_size, symmetric)| {
            let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
            Base::Rtn(rtn.with_symmetric(symmetric))
        },
    );
    let nf = (group_size, any::<bool>()).prop_map(|(block_size, double)| {
        let nf = NormalFloat::new().with_block_size(block_size);
        Base::NormalFloat(match double {
            true => nf.with_double_quant(DoubleQuant::dynamic()),
            false => nf,
        })
    });
    prop_oneof![1 => Just(Base::Dense), 6 => rtn, 1 => nf]
}

#[derive(Clone, Debug)]
enum Tuning {
    Peqa(Peqa),
    Lora(Lora, /* parameters */ usize),
    Tile(Tile, TileMethod),
    Bayesian(Bayesian),
}

fn tunings() -> impl Strategy<Value = Tuning> {
    let alpha = prop::sample::select(vec![0.7, 4.0, 16.0]);
    let lora = (1..=HIDDEN, alpha.clone(), any::<(u64, bool, bool)>()).prop_map(
        |(rank, alpha, (seed, rank_stabilized, dora))| {
            let lora = Lora::new(rank).with_alpha(alpha).with_seed(seed);
            let lora = lora.with_rank_stabilized(rank_stabilized).with_dora(dora);
            // The bias of `up` trains, `down` has none.
            let bias = rank.is_multiple_of(2);
            let n_parameters = 4 + 2 * usize::from(dora) + usize::from(bias);
            Tuning::Lora(lora.with_bias(bias), n_parameters)
        },
    );
    let pooling = prop::sample::select(vec![Pooling::Sum, Pooling::Mean, Pooling::Peft]);
    let tile = (0..4usize, 1..=4usize, alpha, pooling, any::<u64>()).prop_map(
        |(method, rank, alpha, pooling, seed)| {
            let (tile, method) = match method {
                // A group of -1 leaves one pool, whose product has rank 1.
                0 => (Tile::qa_lora(1), TileMethod::QaLora),
                1 => (Tile::q_bara(rank), TileMethod::QBara),
                2 => (
                    Tile::qa_hira().with_repeat(rank.next_power_of_two()),
                    TileMethod::QaHira,
                ),
                _ => (Tile::qa_blora(1), TileMethod::QaBlora),
            };
            let tile = tile.with_alpha(alpha).with_pooling(pooling).with_seed(seed);
            Tuning::Tile(tile, method)
        },
    );
    let bayesian = (1..=HIDDEN, any::<u64>()).prop_map(|(rank, seed)| {
        Tuning::Bayesian(Bayesian::new(rank).with_alpha(4.0).with_seed(seed))
    });
    prop_oneof![
        1 => bayesian,
        2 => any::<bool>().prop_map(|zeros| Tuning::Peqa(Peqa::new().with_zeros(zeros))),
        2 => lora,
        4 => tile,
    ]
}

/// An adapter and a base.
#[derive(Clone, Debug)]
struct Case {
    tuning: Tuning,
    base: Base,
}

/// How an adapter merges into its base.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Merge {
    Exact,
    Bounded,
    OffGrid,
}

fn any_cases() -> impl Strategy<Value = Case> {
    (tunings(), bases()).prop_map(|(tuning, base)| Case { tuning, base })
}

/// Two methods that merge into the codes of one base.
fn tasks() -> impl Strategy<Value = (Rtn, [Tuning; 2])> {
    let bits = prop::sample::select(vec![2, 3, 4, 8]);
    let group_size = prop::sample::select(vec![None, Some(32), Some(128)]);
    let tuning = || {
        tunings().prop_filter("stays off the grid", |tuning| {
            !matches!(
                tuning,
                Tuning::Lora(..) | Tuning::Bayesian(_) | Tuning::Tile(_, TileMethod::QBara)
            )
        })
    };
    (bits, group_size, tuning(), tuning()).prop_map(|(bits, group_size, first, second)| {
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size);
        (rtn, [first, second])
    })
}

/// Those that may be attached.
fn cases() -> impl Strategy<Value = Case> {
    any_cases().prop_filter("refused", |case| case.merge().is_some())
}

impl Case {
    fn method(&self, targets: impl Into<Targets>) -> Box<dyn Method> {
        match &self.tuning {
            Tuning::Peqa(peqa) => Box::new(peqa.clone().with_targets(targets)),
            Tuning::Lora(lora, _) => Box::new(lora.clone().with_targets(targets)),
            Tuning::Tile(tile, _) => Box::new(tile.clone().with_targets(targets)),
            Tuning::Bayesian(method) => Box::new(method.clone().with_targets(targets)),
        }
    }

    /// What the papers say of this method on this base; none where it has no place.
    fn merge(&self) -> Option<Merge> {
        let affine = match &self.base {
            Base::Rtn(rtn) => rtn.format().unwrap().grid() == Grid::Affine,
            _ => false,
        };
        match (&self.tuning, &self.base) {
            (Tuning::Peqa(_), Base::Dense) => None,
            (Tuning::Peqa(peqa), _) if *peqa == Peqa::new().with_zeros(true) && !affine => None,
            (Tuning::Peqa(_), _) => Some(Merge::Exact),
            (Tuning::Lora(..) | Tuning::Bayesian(_) | Tuning::Tile(_, TileMethod::QBara), base) => {
                match base {
                    Base::Dense => Some(Merge::Bounded),
                    _ => Some(Merge::OffGrid),
                }
            }
            (Tuning::Tile(..), Base::Rtn(rtn)) => {
                let group = rtn.format().unwrap().group_size();
                let divides =
                    group.is_none_or(|n| HIDDEN.is_multiple_of(n) && WIDTH.is_multiple_of(n));
                (affine && divides).then_some(Merge::Bounded)
            }
            (Tuning::Tile(..), _) => None,
        }
    }

    fn adapted(&self, seed: u64) -> Bigram {
        let mut model = self.base.model(seed);
        peft::attach(&mut model, &*self.method(Targets::All)).unwrap();
        model
    }

    /// Parameters of both layers' adapters.
    fn n_parameters(&self) -> usize {
        match &self.tuning {
            Tuning::Peqa(_) => 2 + 2 * usize::from(self.trains_zeros()),
            Tuning::Lora(_, n_parameters) => *n_parameters,
            Tuning::Tile(_, TileMethod::QaHira) => 2,
            Tuning::Tile(..) => 4,
            Tuning::Bayesian(_) => 10,
        }
    }

    fn trains_zeros(&self) -> bool {
        match &self.tuning {
            Tuning::Peqa(peqa) => *peqa == Peqa::new().with_zeros(true),
            Tuning::Lora(..) | Tuning::Bayesian(_) => false,
            Tuning::Tile(..) => true,
        }
    }
}

/// Codes, scales and zeros.
type OnGrid = (Vec<u8>, Vec<f32>, Option<Vec<f32>>);

/// What the packed layers hold.
fn codes(model: &Bigram) -> Vec<OnGrid> {
    let linears = model.linears().into_iter();
    let packed = linears.filter_map(|(_, linear)| match linear.weight() {
        Weight::Quant(weight) => Some(weight.clone()),
        Weight::Dense(_) => None,
    });
    let values = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
    packed
        .map(|weight| {
            (
                weight.codes(),
                values(weight.scales()),
                weight.zeros().map(values),
            )
        })
        .collect()
}

/// The part of the way from `base` to `sum` that `found` has gone.
fn kept(base: &[f32], sum: &[f32], found: &[f32]) -> f64 {
    let along = |to: &[f32]| -> f64 {
        let steps = (0..base.len()).map(|at| {
            let [base, sum, to] = [base[at], sum[at], to[at]].map(f64::from);
            (to - base) * (sum - base)
        });
        steps.sum()
    };
    along(found) / along(sum)
}

/// The largest difference of two models' logits, relative to the largest logit.
fn difference(a: &Bigram, b: &Bigram) -> f32 {
    let (a, b) = (logits(a), logits(b));
    let (a, b) = (
        a.into_iter().map(f32::from_bits),
        b.into_iter().map(f32::from_bits),
    );
    let largest = a.clone().fold(0.0, |most: f32, v| most.max(v.abs()));
    a.zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

/// The paths of the parameters that have a gradient, and of those that have none.
struct Gradients<'a> {
    gradients: &'a burn::optim::GradientsParams,
    path: Vec<String>,
    with: Vec<String>,
    without: Vec<String>,
}

impl ModuleVisitor for Gradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.get::<D>(param.id);
        // What is not tracked costs no work in the backward pass.
        assert_eq!(param.val().is_tracked(), gradient.is_some());
        let list = match gradient {
            Some(gradient) => {
                assert!(gradient.abs().max().into_scalar::<f32>() > 0.0);
                &mut self.with
            }
            None => &mut self.without,
        };
        list.push(self.path.join("."));
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Attaching changes no bit, or is refused and changes nothing.
    #[test]
    fn attaching_is_neutral(case in any_cases(), seed in 0..1000u64) {
        let mut model = case.base.model(seed);
        let (base, before) = (Fingerprint::of(&model), logits(&model));
        let attached = peft::attach(&mut model, &*case.method(Targets::All));
        prop_assert_eq!(attached.is_ok(), case.merge().is_some(), "{:?}", attached);
        prop_assert_eq!(Fingerprint::of(&model), base);
        prop_assert_eq!(logits(&model), before);
        match attached {
            Ok(attached) => {
                prop_assert_eq!(attached.paths, ["mlp.up", "mlp.down"]);
                prop_assert!(attached.n_trainable > 0);
            }
            Err(error) => {
                prop_assert!(matches!(
                    &error,
                    Error::NeedsQuantized { path, .. } | Error::Tiles { path, .. } | Error::Zeros { path, .. }
                        if path == "mlp.up"
                ), "{}", error);
                prop_assert!(model.linears().iter().all(|(_, linear)| linear.adapter().is_none()));
            }
        }
    }

    /// A merge changes no bit where it is exact, and nothing that f32 could tell where it is bounded;
    /// codes and scales stay. What codes cannot hold is refused, and merges in the ways that are
    /// asked for by name.
    #[test]
    fn merging_keeps_what_was_tuned(case in cases(), seed in 0..1000u64) {
        let mut model = case.adapted(seed);
        let (base, before, on_grid) = (Fingerprint::of(&model), logits(&model), codes(&model));
        tune(&mut model, seed);
        let adapted = model.clone();
        prop_assert_ne!(logits(&adapted), before.clone());
        // The base is frozen.
        prop_assert_eq!(Fingerprint::of(&model), base.clone());
        let merge = case.merge().unwrap();
        if merge == Merge::OffGrid {
            let error = peft::merge(&mut model).unwrap_err();
            let named = matches!(&error, Error::MergeIntoPacked { path, .. } if path == "mlp.up");
            prop_assert!(named, "{}", error);
            prop_assert_eq!(logits(&model), logits(&adapted));
            let dense = peft::merge_with(&mut model, OffGrid::Dense).unwrap();
            prop_assert!(dense.layers.iter().all(|layer| layer.format.is_none()));
            prop_assert_eq!(dense.kind(), "bounded");
            prop_assert!(difference(&adapted, &model) < 1e-5);

            let mut rounded = adapted.clone();
            let eight = Rtn::new().with_bits(8).with_group_size(32);
            let probe = batch(99, [2, 9]);
            let certificate = peft::merge_probed(&mut rounded, OffGrid::Round(&eight), &probe).unwrap();
            prop_assert_eq!(certificate.kind(), "rounded");
            certificate.verify(&rounded).unwrap();
            let weights = |model: &Bigram| -> Vec<Vec<f32>> {
                let linears = model.linears().into_iter();
                let dense = linears.map(|(_, linear)| linear.weight().to_dense());
                dense.map(|weight| weight.into_data().try_into_vec().unwrap()).collect()
            };
            let [base, sum, found] = [&adapted, &model, &rounded].map(weights);
            for (at, layer) in certificate.layers.iter().enumerate() {
                let Exactness::Rounded { relative_error, retention } = layer.exactness else {
                    panic!("{:?}", layer.exactness);
                };
                prop_assert_eq!(layer.format, Some(eight.format().unwrap()));
                let [error, all] = [&found[at], &vec![0.0; sum[at].len()]].map(|other| {
                    let differences = sum[at].iter().zip(other).map(|(a, b)| f64::from(a - b));
                    differences.map(|d| d * d).sum::<f64>().sqrt()
                });
                prop_assert!((relative_error - error / all).abs() < 1e-5, "{}", relative_error);
                let expected = kept(&base[at], &sum[at], &found[at]);
                prop_assert!((retention - expected).abs() < 1e-5, "{} {}", retention, expected);
            }
            let measured = certificate.probe.unwrap();
            let mut plain = adapted.clone();
            peft::detach(&mut plain).unwrap();
            let [base, sum, found] = [&plain, &adapted, &rounded].map(|model| {
                logits(model).into_iter().map(f32::from_bits).collect::<Vec<_>>()
            });
            prop_assert!((measured.retention - kept(&base, &sum, &found)).abs() < 1e-9);
            let change = |a: &[f32], b: &[f32]| {
                let changes = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
                changes.fold(0.0, f64::max)
            };
            prop_assert_eq!(measured.max_adapter_change, change(&base, &sum));
            prop_assert_eq!(measured.max_merge_change, change(&sum, &found));
            return Ok(());
        }
        let probe = batch(99, [2, 9]);
        let certificate = peft::merge_probed(&mut model, OffGrid::Refuse, &probe).unwrap();
        let measured = certificate.probe.unwrap();
        prop_assert_eq!(measured.n_logits, before.len());
        prop_assert!(measured.max_adapter_change > 0.0);
        match merge {
            Merge::Exact => {
                prop_assert!(certificate.is_exact());
                prop_assert_eq!(certificate.kind(), "exact");
                prop_assert_eq!(logits(&model), logits(&adapted));
                prop_assert_eq!((measured.max_merge_change, measured.retention), (0.0, 1.0));
            }
            _ => {
                prop_assert_eq!(certificate.kind(), "bounded");
                prop_assert!(difference(&adapted, &model) < 1e-5, "{}", certificate);
                prop_assert!((measured.retention - 1.0).abs() < 1e-3, "{}", certificate);
                for layer in &certificate.layers {
                    let Exactness::Bounded { max_weight_error, max_weight } = layer.exactness else {
                        panic!("{:?}", layer.exactness);
                    };
                    // What LoRA states is a bound, what the tiles state is measured.
                    let bound = match case.tuning {
                        Tuning::Tile(..) => 1e-6,
                        _ => 1e-4,
                    };
                    prop_assert!(max_weight_error <= bound * max_weight, "{}", certificate);
                }
            }
        }
        // The same codes; of scales and zeros, only those that the method trains are others.
        for (before, after) in on_grid.iter().zip(codes(&model)) {
            prop_assert_eq!(&before.0, &after.0);
            prop_assert_eq!(before.1 == after.1, matches!(case.tuning, Tuning::Tile(..)));
            prop_assert_eq!(before.2 == after.2, !case.trains_zeros());
        }
        certificate.verify(&model).unwrap();
        let mut other = model.clone();
        other.embedding = other.embedding.map(|embedding| embedding + 1e-3);
        for stranger in [case.base.model(seed), other] {
            let refused = matches!(certificate.verify(&stranger), Err(Error::NotMerged { .. }));
            prop_assert!(refused);
        }
        prop_assert!(matches!(peft::merge(&mut model), Err(Error::NoAdapters)));
    }

    #[test]
    fn only_adapters_have_gradients(case in cases(), seed in 0..1000u64) {
        let mut model = case.adapted(seed);
        // A fresh `B` of LoRA gives `A` a gradient of zero.
        tune(&mut model, seed);
        let model = model.train();
        let loss = token_nll(&model, &batch(seed, [2, 9])).sum();
        let gradients = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
        let mut visitor = Gradients { gradients: &gradients, path: vec![], with: vec![], without: vec![] };
        model.visit(&mut visitor);
        prop_assert_eq!(visitor.with.len(), case.n_parameters());
        prop_assert!(visitor.with.iter().all(|path| path.contains("adapter")));
        prop_assert!(visitor.without.iter().all(|path| !path.contains("adapter")));
    }

    /// Blocks that are run again give the same losses, gradients and parameters, whatever trains.
    #[test]
    fn checkpointing_changes_no_bit(case in cases(), seed in 0..1000u64, trained in 0..4usize) {
        let mut model = case.base.model(seed);
        match trained {
            0 => drop(peft::attach(&mut model, &*case.method(Targets::All)).unwrap()),
            1 => drop(peft::attach(&mut model, &*case.method(["down"])).unwrap()),
            // Below, and above as the head.
            _ => model.embedding = model.embedding.set_require_grad(true),
        }
        if trained == 3 {
            peft::attach(&mut model, &*case.method(["up"])).unwrap();
        }
        let batches: Vec<Batch> = (0..3).map(|at| batch(seed + at, [2, 9])).collect();
        let run = |checkpoint_blocks| {
            let mut model = model.clone();
            let config = FitConfig::new()
                .with_accumulation(2)
                .with_epochs(2)
                .with_checkpoint_blocks(checkpoint_blocks);
            let mut steps = Vec::new();
            fit(&mut model, &batches, &config, |step| steps.push(step.clone())).unwrap();
            (steps, Fingerprint::of(&model), logits(&model))
        };
        prop_assert_eq!(run(true), run(false));
    }

    /// A directory gives the adapters back, and switching tasks there and back changes no bit.
    #[test]
    fn adapters_are_saved_and_switched_bit_for_bit(case in cases(), seed in 0..1000u64) {
        let dir = tempfile::tempdir().unwrap();
        let base = case.base.model(seed);
        let mut tasks = Vec::new();
        for task in 0..2 {
            let mut model = base.clone();
            peft::attach(&mut model, &*case.method(Targets::All)).unwrap();
            tune(&mut model, seed + 10 * task);
            let path = dir.path().join(format!("task-{task}"));
            Adapters::of(&model).unwrap().save(&path).unwrap();
            tasks.push((Adapters::load(&path, &Device::flex()).unwrap(), logits(&model)));
        }
        let mut model = base.clone();
        let none = peft::activate(&mut model, &tasks[0].0).unwrap();
        prop_assert_eq!(none.layers().count(), 0);
        prop_assert_eq!(logits(&model), tasks[0].1.clone());
        let first = peft::activate(&mut model, &tasks[1].0).unwrap();
        prop_assert_eq!(logits(&model), tasks[1].1.clone());
        peft::activate(&mut model, &first).unwrap();
        prop_assert_eq!(logits(&model), tasks[0].1.clone());
        peft::activate(&mut model, &none).unwrap();
        prop_assert_eq!(logits(&model), logits(&base));
    }

    /// Tasks on one base: each is the merged model, bit for bit, whatever was there before it.
    #[test]
    fn tasks_are_the_merged_models(cases in tasks(), seed in 0..1000u64) {
        let dir = tempfile::tempdir().unwrap();
        let (rtn, tunings) = cases;
        let base = quantized(seed, &rtn);
        let fingerprint = Fingerprint::of(&base);
        let mut served = Tasks::new(base.clone()).unwrap();
        let mut merged = Vec::new();
        for (at, tuning) in tunings.iter().enumerate() {
            let case = Case { tuning: tuning.clone(), base: Base::Rtn(rtn) };
            let mut model = base.clone();
            // A task may leave layers as they are.
            let targets = match at {
                0 => Targets::All,
                _ => Targets::from(["down"]),
            };
            peft::attach(&mut model, &*case.method(targets)).unwrap();
            tune(&mut model, seed + at as u64);
            let pack = TaskPack::of(&model).unwrap();
            prop_assert_eq!(pack.base(), &fingerprint);
            let path = dir.path().join(format!("{at}"));
            pack.save(&path).unwrap();
            prop_assert_eq!(&TaskPack::load(&path).unwrap(), &pack);
            let (rounded, change) = pack.clone().rounded_to_f16().unwrap();
            prop_assert!(change <= 2f64.powi(-11), "{}", change);
            prop_assert_eq!(rounded.n_values(), pack.n_values());
            let half = dir.path().join(format!("{at}-f16"));
            rounded.save(&half).unwrap();
            let n_bytes = |dir: &std::path::Path| {
                std::fs::metadata(dir.join("task.safetensors")).unwrap().len() as usize
            };
            prop_assert!(n_bytes(&half) < n_bytes(&path));
            prop_assert_eq!(TaskPack::load(&half).unwrap(), rounded);
            served.insert(format!("{at}"), pack).unwrap();
            peft::merge(&mut model).unwrap();
            merged.push(model);
        }
        for at in [1, 0, 1] {
            served.activate(Some(&format!("{at}"))).unwrap();
            prop_assert_eq!(Fingerprint::of(served.model()), Fingerprint::of(&merged[at]));
            prop_assert_eq!(logits(served.model()), logits(&merged[at]));
        }
        let error = served.activate(Some("2")).unwrap_err();
        let named = matches!(&error, Error::UnknownTask { name, names } if name == "2" && names == &["0", "1"]);
        prop_assert!(named, "{}", error);
        served.activate(None).unwrap();
        prop_assert_eq!(Fingerprint::of(served.model()), fingerprint);
    }
}

fn adapted(seed: u64) -> Bigram {
    let mut model = quantized(seed, &Rtn::new().with_bits(3).with_group_size(4));
    peft::attach(&mut model, &Peqa::new()).unwrap();
    model
}

/// Batches of several sizes in one step give the step of one batch with all of their windows.
#[test]
fn accumulation_weighs_each_token_the_same() {
    let parts = [batch(1, [1, 9]), batch(2, [3, 9]), batch(3, [2, 9])];
    let whole = Tensor::cat(parts.iter().map(Batch::tokens).collect(), 0);
    let whole = [Batch::new(whole).unwrap()];
    let step = |batches: &[Batch]| {
        let config = FitConfig::new()
            .with_accumulation(batches.len())
            .with_steps(Some(1));
        let mut found = None;
        let mut model = adapted(5);
        fit(&mut model, batches, &config, |step| {
            found = Some(step.clone())
        })
        .unwrap();
        found.unwrap()
    };
    let (parts, whole) = (step(&parts), step(&whole));
    assert_eq!(parts.n_targets, whole.n_targets);
    assert!((parts.loss - whole.loss).abs() < 1e-6);
    assert!((parts.grad_norm / whole.grad_norm - 1.0).abs() < 1e-5);
}

#[test]
fn training_lowers_the_loss_and_is_repeatable() {
    let batches: Vec<Batch> = (0..4).map(|at| batch(at, [4, 9])).collect();
    let run = |seed| {
        let mut model = adapted(7);
        let config = FitConfig::new()
            .with_learning_rate(0.05)
            .with_epochs(20)
            .with_schedule(Schedule::Linear)
            .with_seed(seed);
        let mut losses = Vec::new();
        fit(&mut model, &batches, &config, |step| losses.push(step.loss)).unwrap();
        (losses, logits(&model))
    };
    let (losses, tuned) = run(3);
    assert_eq!(losses.len(), 80);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean(&losses[60..]) < 0.8 * mean(&losses[..4]), "{losses:?}");
    assert_eq!(run(3).1, tuned);
    assert_ne!(run(4).1, tuned);
}

#[test]
fn a_loss_that_is_not_finite_names_the_step_and_loses_nothing() {
    let mut model = adapted(8);
    let before = logits(&model);
    // Factors that grow by a million each step overflow soon.
    let config = FitConfig::new()
        .with_learning_rate(1e20)
        .with_steps(Some(50));
    let error = fit(&mut model, &[batch(1, [2, 9])], &config, |_| {}).unwrap_err();
    assert!(
        matches!(&error, Error::NonFinite { step, .. } if *step > 1),
        "{error}"
    );
    assert_eq!(logits(&model), before);
}

#[test]
fn a_gradient_that_is_not_finite_names_its_tensor() {
    let mut model = adapted(8);
    // The loss is finite, but the gradient's square is not.
    if let Some((_, linear)) = model.linears_mut().into_iter().nth(1) {
        let weight = tensor(3, [WIDTH, HIDDEN]) * 1e30;
        *linear = Linear::new(Weight::frozen(weight), None);
        linear.quantize("mlp.down", &Rtn::new(), None).unwrap();
    }
    let error = fit(&mut model, &[batch(1, [2, 9])], &FitConfig::new(), |_| {}).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("up.adapter") && message.contains("factors"),
        "{message}"
    );
    assert!(message.contains("step 1"), "{message}");
}

/// Factors that the last step made infinite are not returned, though loss and gradients were finite.
#[test]
fn a_result_that_is_not_finite_is_refused() {
    let mut model = adapted(8);
    let before = logits(&model);
    // The decay multiplies the factors by 1 - 3e39, which f32 does not hold.
    let config = FitConfig::new()
        .with_learning_rate(3e38)
        .with_weight_decay(10.0)
        .with_schedule(Schedule::Constant)
        .with_steps(Some(1));
    let error = fit(&mut model, &[batch(1, [2, 9])], &config, |_| {}).unwrap_err();
    let named = matches!(&error, Error::NonFinite { what, step: 1 } if what.contains("factors"));
    assert!(named, "{error}");
    assert_eq!(logits(&model), before);
}

#[test]
fn tokens_that_the_model_lacks_are_refused() {
    let mut model = adapted(1);
    for bad in [VOCAB as i32, -1] {
        let tokens = TensorData::new(vec![1, bad, 2], [1, 3]);
        let batch = Batch::new(Tensor::from_data(tokens, &Device::flex())).unwrap();
        let error = fit(&mut model, &[batch], &FitConfig::new(), |_| {}).unwrap_err();
        assert!(matches!(error, Error::Token { token, .. } if token == i64::from(bad)));
    }
}

#[test]
fn what_cannot_be_adapted_is_refused_and_left_alone() {
    let mut model = dense(1);
    let before = logits(&model);
    let error = peft::attach(&mut model, &Peqa::new()).unwrap_err();
    assert!(
        matches!(&error, Error::NeedsQuantized { path, .. } if path == "mlp.up"),
        "{error}"
    );
    let batches = [batch(1, [2, 9])];
    let error = fit(&mut model, &batches, &FitConfig::new(), |_| {}).unwrap_err();
    assert!(matches!(error, Error::NothingToTrain));
    assert_eq!(logits(&model), before);

    let mut model = quantized(1, &Rtn::new());
    let error = peft::attach(&mut model, &Peqa::new().with_targets(["up", "q_proj"])).unwrap_err();
    let named = matches!(&error, Error::NoTarget { targets, names, .. }
        if targets == &["q_proj"] && names == &["down", "up"]);
    assert!(named, "{error}");
    assert!(matches!(peft::merge(&mut model), Err(Error::NoAdapters)));
    assert!(matches!(Adapters::of(&model), Err(Error::NoAdapters)));
    peft::attach(&mut model, &Peqa::new().with_targets(["down"])).unwrap();
    let error = peft::attach(&mut model, &Peqa::new()).unwrap_err();
    assert!(
        matches!(&error, Error::AlreadyAdapted { path } if path == "mlp.down"),
        "{error}"
    );
    assert!(model.up.adapter().is_none());
    let error = model.up.quantize("mlp.up", &Rtn::new(), None).unwrap_err();
    assert!(matches!(error, Error::AlreadyQuantized { .. }));
    let error = fit(&mut model, &[], &FitConfig::new(), |_| {}).unwrap_err();
    assert!(matches!(error, Error::NoBatches));
    let config = FitConfig::new().with_steps(Some(3)).with_warmup_steps(4);
    let error = fit(&mut model, &batches, &config, |_| {}).unwrap_err();
    assert!(matches!(
        error,
        Error::Setting {
            setting: "warmup_steps",
            ..
        }
    ));
}

#[test]
fn adapters_of_another_base_are_refused() {
    let adapters = Adapters::of(&adapted(1)).unwrap();
    for seed in [2, 3] {
        let mut other = adapted(seed);
        let before = logits(&other);
        let error = peft::activate(&mut other, &adapters).unwrap_err();
        assert!(matches!(error, Error::OtherBase { .. }));
        assert_eq!(logits(&other), before);
    }
    // The base after a merge is another one.
    let mut merged = adapted(1);
    tune(&mut merged, 1);
    peft::merge(&mut merged).unwrap();
    assert!(matches!(
        peft::activate(&mut merged, &adapters),
        Err(Error::OtherBase { .. })
    ));
}

#[test]
fn damaged_adapter_directories_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let adapters = Adapters::of(&adapted(1)).unwrap();
    let write = |name: &str| {
        let path = dir.path().join(name);
        adapters.save(&path).unwrap();
        path
    };
    let load = |path: &std::path::Path| Adapters::load(path, &Device::flex()).unwrap_err();

    let path = write("twice");
    assert!(matches!(
        adapters.save(&path),
        Err(Error::File(tensor_files::Error::OutputExists { .. }))
    ));
    assert!(Adapters::load(&path, &Device::flex()).is_ok());

    let path = write("truncated");
    let file = path.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for n in [0, 7, 100, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..n]).unwrap();
        let error = load(&path);
        assert!(
            matches!(&error, Error::File(tensor_files::Error::File { .. })),
            "{n}: {error}"
        );
    }
    std::fs::write(
        &file,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    assert!(load(&path).to_string().contains("git lfs pull"));
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(
        load(&path),
        Error::File(tensor_files::Error::Io { .. })
    ));

    let config = |name: &str, from: &str, to: &str| {
        let path = write(name);
        let file = path.join("adapter_config.json");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(from));
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
        load(&path)
    };
    let error = config("missing", "mlp.down", "mlp.gate");
    assert!(
        matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor.starts_with("mlp.gate"))
    );
    let error = config("extra", "\"mlp.up\":", "\"mlp.down\":");
    assert!(
        matches!(&error, Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor.starts_with("mlp.up")),
        "{error}"
    );
    let error = config("method", "\"peqa\"", "\"ia3\"").to_string();
    assert!(error.contains("unknown variant `ia3`"), "{error}");
    let error = config("setting", "\"zeros\":", "\"zero\":").to_string();
    assert!(error.contains("unknown field `zero`"), "{error}");
    assert!(
        config("version", "\"format_version\": 3", "\"format_version\": 1")
            .to_string()
            .contains("is 1")
    );
    assert!(matches!(
        config("json", "{", "["),
        Error::File(tensor_files::Error::File { .. })
    ));
}

#[test]
fn damaged_and_strange_tasks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = adapted(1);
    tune(&mut model, 1);
    let pack = TaskPack::of(&model).unwrap();
    let stranger = quantized(2, &Rtn::new().with_bits(3).with_group_size(4));
    let mut tasks = Tasks::new(stranger).unwrap();
    let error = tasks.insert("task", pack.clone()).unwrap_err();
    assert!(matches!(error, Error::OtherBase { .. }), "{error}");
    assert!(matches!(
        Tasks::new(model),
        Err(Error::AlreadyAdapted { .. })
    ));
    assert!(matches!(TaskPack::of(&dense(1)), Err(Error::NoAdapters)));
    let mut lora = quantized(1, &Rtn::new());
    peft::attach(&mut lora, &Lora::new(1)).unwrap();
    assert!(matches!(
        TaskPack::of(&lora),
        Err(Error::MergeIntoPacked { .. })
    ));
    let mut lora = dense(1);
    peft::attach(&mut lora, &Lora::new(1)).unwrap();
    assert!(matches!(
        TaskPack::of(&lora),
        Err(Error::NeedsQuantized { .. })
    ));

    let edited = |name: &str, from: &str, to: &str| {
        let path = dir.path().join(name);
        pack.save(&path).unwrap();
        let file = path.join("task.json");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
        TaskPack::load(&path)
    };
    assert!(edited("same", "scales", "scales").is_ok());
    for (name, from, to) in [
        ("part", "scales", "biases"),
        ("layer", "mlp.down", "mlp.gate"),
        ("version", "\"format_version\": 1", "\"format_version\": 7"),
        ("json", "{", "["),
    ] {
        let error = edited(name, from, to).unwrap_err();
        let refused = matches!(
            error,
            Error::File(tensor_files::Error::File { .. })
                | Error::File(tensor_files::Error::MissingTensor { .. })
        );
        assert!(refused, "{name}: {error}");
    }
    let path = dir.path().join("extra");
    pack.save(&path).unwrap();
    let values = || vec![0.5; 4];
    let tensors = ["mlp.up.scales", "mlp.down.scales", "mlp.gate.scales"].map(|name| {
        (
            name.to_string(),
            LazyTensor::floats_as(FloatType::F32, [2, 2], values),
        )
    });
    tensor_files::write_tensors(&path.join("task.safetensors"), tensors).unwrap();
    let error = TaskPack::load(&path).unwrap_err();
    assert!(
        matches!(error, Error::File(tensor_files::Error::Tensor { .. })),
        "{error}"
    );
    // Of the right base, with a layer of another shape.
    let tensors = ["mlp.up.scales", "mlp.down.scales"].map(|name| {
        (
            name.to_string(),
            LazyTensor::floats_as(FloatType::F32, [2, 2], values),
        )
    });
    tensor_files::write_tensors(&path.join("task.safetensors"), tensors).unwrap();
    let small = TaskPack::load(&path).unwrap();
    let mut tasks = Tasks::new(quantized(1, &Rtn::new().with_bits(3).with_group_size(4))).unwrap();
    let error = tasks.insert("small", small).unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
    assert!(tasks.insert("task", pack).unwrap().is_none());
    assert_eq!(tasks.names().collect::<Vec<_>>(), ["task"]);
}

/// LoRA+ gives `B` its own rate: the first step of AdamW moves each value by its rate.
#[test]
fn lora_plus_gives_b_its_own_rate() {
    let mut model = dense(1);
    peft::attach(&mut model, &Lora::new(2).with_dora(true)).unwrap();
    tune(&mut model, 1);
    let values = |model: &Bigram| {
        let Some(Adapter::Lora(lora)) = model.up.adapter() else {
            panic!("no LoRA");
        };
        let magnitude = lora.magnitude().unwrap().unsqueeze();
        [lora.a(), lora.b(), magnitude].map(|t| t.into_data().try_into_vec::<f32>().unwrap())
    };
    let before = values(&model);
    let config = FitConfig::new()
        .with_learning_rate(1e-3)
        .with_schedule(Schedule::Constant)
        .with_lora_plus_ratio(16.0)
        .with_steps(Some(1));
    fit(&mut model, &[batch(1, [2, 9])], &config, |_| {}).unwrap();
    let moved = before.iter().zip(values(&model)).map(|(before, after)| {
        let moves = before
            .iter()
            .zip(after)
            .map(|(before, after)| (after - before).abs());
        moves.fold(0.0, f32::max)
    });
    for (moved, expected) in moved.zip([1e-3, 1.6e-2, 1.6e-2]) {
        assert!((moved / expected - 1.0).abs() < 1e-2, "{moved} {expected}");
    }
    let config = config.with_lora_plus_ratio(0.0);
    assert!(matches!(config.check(), Err(Error::Setting { .. })));
}

/// A price on what is open shuts gates; without one, what the task needs stays open.
#[test]
fn bayesian_lora_shuts_what_costs_more_than_it_gives() {
    let tuned = |penalty: f32| {
        let mut model = dense(3);
        peft::attach(&mut model, &Bayesian::new(4).with_penalty(penalty)).unwrap();
        let config = FitConfig::new()
            .with_learning_rate(2e-2)
            .with_steps(Some(60));
        peft::fit(&mut model, &[batch(4, [4, 12])], &config, |_| {}).unwrap();
        let Some(Adapter::Bayesian(adapter)) = model.up.adapter() else {
            panic!("attached");
        };
        (adapter.rank(), adapter.bits())
    };
    let (rank, bits) = tuned(0.0);
    assert!(rank >= 3 && bits[0] >= 8, "{rank} {bits:?}");
    let (rank, bits) = tuned(30.0);
    assert!(rank == 0 || bits == [0, 0], "{rank} {bits:?}");
}

/// Dropout changes what is trained, by its seed alone, and nothing once training is over.
#[test]
fn dropout_follows_its_seed() {
    let run = |probability, seed, checkpoint_blocks| {
        let mut model = quantized(3, &Rtn::new().with_group_size(32));
        let tile = Tile::qa_lora(2).with_dropout(probability);
        peft::attach(&mut model, &tile).unwrap();
        let batches: Vec<Batch> = (0..3).map(|at| batch(at, [2, 9])).collect();
        let config = FitConfig::new()
            .with_learning_rate(0.02)
            .with_steps(Some(6))
            .with_seed(seed)
            .with_checkpoint_blocks(checkpoint_blocks);
        fit(&mut model, &batches, &config, |_| {}).unwrap();
        assert_eq!(logits(&model), logits(&model));
        logits(&model)
    };
    assert_eq!(run(0.5, 1, false), run(0.5, 1, true));
    assert_ne!(run(0.5, 1, false), run(0.0, 1, false));
    assert_ne!(run(0.5, 1, false), run(0.5, 2, false));
}

/// Files of LoRA whose tensors do not belong together.
#[test]
fn damaged_lora_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let lora = |rank| {
        let mut model = dense(1);
        peft::attach(&mut model, &Lora::new(rank)).unwrap();
        Adapters::of(&model).unwrap()
    };
    let path = dir.path().join("lora");
    lora(2).save(&path).unwrap();
    let file = path.join("adapter_model.safetensors");
    let write = |[a, b]: [[usize; 2]; 2]| {
        let tensors = [("a", a), ("b", b)].map(|(name, dims)| {
            let values = move || vec![0.5; dims[0] * dims[1]];
            (
                format!("mlp.down.{name}"),
                LazyTensor::floats_as(FloatType::F32, dims, values),
            )
        });
        tensor_files::write_tensors(&file, tensors).unwrap();
        Adapters::load(&path, &Device::flex()).unwrap_err()
    };
    for dims in [[[WIDTH, 2], [3, HIDDEN]], [[WIDTH, 0], [0, HIDDEN]]] {
        let error = write(dims);
        let named = matches!(&error, Error::File(tensor_files::Error::Tensor { tensor, .. }) if tensor == "mlp.down.b");
        assert!(named, "{error}");
    }
    let error = write([[WIDTH, 2], [2, HIDDEN]]);
    let named = matches!(&error, Error::File(tensor_files::Error::MissingTensor { tensor, .. }) if tensor == "mlp.up.a");
    assert!(named, "{error}");
    for (at, (setting, value)) in [("alpha", "-1.0"), ("dropout", "1.0")]
        .into_iter()
        .enumerate()
    {
        let dir = dir.path().join(format!("setting-{at}"));
        lora(2).save(&dir).unwrap();
        let config = dir.join("adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let old = match setting {
            "alpha" => "\"alpha\": 2.0",
            _ => "\"dropout\": 0.0",
        };
        assert!(text.contains(old), "{text}");
        std::fs::write(
            &config,
            text.replace(old, &format!("\"{setting}\": {value}")),
        )
        .unwrap();
        let error = Adapters::load(&dir, &Device::flex()).unwrap_err();
        let named = matches!(error, Error::Setting { setting: found, .. } if found == setting);
        assert!(named, "{error}");
    }
    // Adapters of other dimensions than the layer's, with the fingerprint of its base.
    let fit = |dims: [usize; 2]| {
        let mut model = dense(1);
        let other = Linear::new(Weight::frozen(tensor(3, dims)), None);
        let mut small = model.clone();
        small.down = other;
        peft::attach(&mut small, &Lora::new(2)).unwrap();
        let dir = dir.path().join(format!("{dims:?}"));
        Adapters::of(&small).unwrap().save(&dir).unwrap();
        let config = "adapter_config.json";
        std::fs::copy(path.join(config), dir.join(config)).unwrap();
        let adapters = Adapters::load(&dir, &Device::flex()).unwrap();
        peft::activate(&mut model, &adapters).map(|_| ())
    };
    for dims in [[WIDTH - 1, HIDDEN], [WIDTH, HIDDEN - 1]] {
        let error = fit(dims).unwrap_err();
        let named = matches!(&error, Error::Shape { path, .. } if path == "mlp.down");
        assert!(named, "{error}");
    }
    assert!(fit([WIDTH, HIDDEN]).is_ok());
}

#[test]
fn a_failed_write_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new");
    let error = tensor_files::write_directory(&target, |staging| {
        std::fs::write(staging.join("half"), "written").unwrap();
        Err(Error::NoBatches)
    });
    assert!(matches!(error, Err(Error::NoBatches)));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // An empty directory may be filled, a file may not be replaced.
    std::fs::create_dir(&target).unwrap();
    tensor_files::write_directory(&target, |_| Ok::<(), Error>(())).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "something else").unwrap();
    let error = tensor_files::write_directory(&file, |_| Ok(()));
    assert!(matches!(
        error,
        Err(Error::File(tensor_files::Error::OutputExists { .. }))
    ));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "something else");
}

#[test]
fn dense_layers_run_without_a_grid() {
    let device = Device::flex();
    let weight = Tensor::random([6, 3], Distribution::Default, &device);
    let linear = Linear::new(Weight::frozen(weight.clone()), None);
    let x = Tensor::<3>::random([2, 4, 6], Distribution::Default, &device);
    let expected = x.clone().matmul(weight.unsqueeze());
    linear
        .forward(x)
        .into_data()
        .assert_approx_eq::<f32>(&expected.into_data(), Default::default());
}
