//! The laws of every adapter, over every format, on a small language model.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::activation::silu;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use peft::files::LazyTensor;
use peft::{
    Adapter, Adapters, Batch, CausalLm, Error, Exactness, Fingerprint, FitConfig, Linear, Linears,
    Lora, Method, Peqa, Schedule, Targets, Weight, fit, token_nll,
};
use proptest::prelude::*;
use quant_core::{DoubleQuant, NormalFloat, Quantizer, Rtn};

const VOCAB: usize = 11;
const HIDDEN: usize = 16;
const WIDTH: usize = 20;

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

impl CausalLm for Bigram {
    type Positions = ();

    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn n_blocks(&self) -> usize {
        2
    }

    fn positions(&self, _: usize, _: &Device) {}

    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
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

    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        x
    }

    fn head(&self) -> Tensor<2> {
        self.embedding.val().transpose()
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

fn tensor(seed: u64, dims: [usize; 2]) -> Tensor<2> {
    let values = TensorData::new(numbers(seed, dims[0] * dims[1]), dims);
    Tensor::from_data(values, &Device::flex())
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

fn codes(model: &Bigram) -> Vec<(Vec<u8>, Option<Vec<f32>>)> {
    let parts = model
        .linears()
        .into_iter()
        .map(|(_, linear)| match linear.weight() {
            Weight::Quant(weight) => (weight.codes(), weight.to_parts().zeros),
            Weight::Dense(_) => panic!("the weight is not packed"),
        });
    parts.collect()
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

fn formats() -> impl Strategy<Value = Rtn> {
    let bits = prop::sample::select(vec![2, 3, 4, 8]);
    // Groups that divide, that leave a short one, and one per channel.
    let group_size = prop::sample::select(vec![None, Some(4), Some(7), Some(16)]);
    (bits, group_size, any::<bool>()).prop_map(|(bits, group_size, symmetric)| {
        Rtn::new()
            .with_bits(bits)
            .with_group_size(group_size)
            .with_symmetric(symmetric)
    })
}

/// An adapter and a base that it can be attached to.
#[derive(Clone, Debug)]
enum Case {
    Peqa(Rtn),
    Lora(Lora, Base),
}

#[derive(Clone, Debug)]
enum Base {
    Dense,
    Rtn(Rtn),
    NormalFloat(NormalFloat),
}

impl Case {
    fn base(&self, seed: u64) -> Bigram {
        match self {
            Case::Peqa(rtn) | Case::Lora(_, Base::Rtn(rtn)) => quantized(seed, rtn),
            Case::Lora(_, Base::NormalFloat(nf)) => quantized(seed, nf),
            Case::Lora(_, Base::Dense) => dense(seed),
        }
    }

    fn method(&self, targets: impl Into<Targets>) -> Box<dyn Method> {
        match self {
            Case::Peqa(_) => Box::new(Peqa::new().with_targets(targets)),
            Case::Lora(lora, _) => Box::new(lora.clone().with_targets(targets)),
        }
    }

    fn attach(&self, model: &mut Bigram) {
        peft::attach(model, &*self.method(Targets::All)).unwrap();
    }

    /// Parameters of each layer's adapter.
    fn n_parameters(&self) -> usize {
        match self {
            Case::Peqa(_) => 1,
            Case::Lora(..) => 2,
        }
    }
}

fn loras() -> impl Strategy<Value = Lora> {
    let alpha = prop::sample::select(vec![0.7, 4.0, 16.0]);
    (1..=HIDDEN, alpha, any::<u64>())
        .prop_map(|(rank, alpha, seed)| Lora::new(rank).with_alpha(alpha).with_seed(seed))
}

fn cases() -> impl Strategy<Value = Case> {
    let nf = NormalFloat::new().with_block_size(4);
    let nf = nf.with_double_quant(DoubleQuant::dynamic());
    let base = prop_oneof![
        Just(Base::Dense),
        Just(Base::NormalFloat(nf)),
        formats().prop_map(Base::Rtn),
    ];
    prop_oneof![
        formats().prop_map(Case::Peqa),
        (loras(), base).prop_map(|(lora, base)| Case::Lora(lora, base)),
    ]
}

/// What a row of outputs can differ by, for each of `n` of them: the sums of the magnitudes of their
/// terms.
fn magnitudes(linear: &Linear, x: &[f32]) -> Vec<f64> {
    let (Weight::Dense(weight), Some(Adapter::Lora(lora))) = (linear.weight(), linear.adapter())
    else {
        panic!("not LoRA on a dense weight");
    };
    let values = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
    let [w, a, b] = [weight.val(), lora.a(), lora.b()].map(values);
    let abs = |value: f32| f64::from(value).abs();
    let (rank, d_out) = (lora.rank(), linear.weight().dims()[1]);
    let product = |i: usize, j: usize| -> f64 {
        (0..rank)
            .map(|k| abs(a[i * rank + k]) * abs(b[k * d_out + j]))
            .sum()
    };
    let element = |i, j| abs(w[i * d_out + j]) + abs(lora.scale()) * product(i, j);
    (0..d_out)
        .map(|j| {
            (x.iter().enumerate())
                .map(|(i, &x)| abs(x) * element(i, j))
                .sum()
        })
        .collect()
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

    /// Attaching changes no bit; merging changes none, and keeps codes and zeros.
    #[test]
    fn merging_is_exact_and_stays_on_the_codes(rtn in formats(), seed in 0..1000u64) {
        let mut model = quantized(seed, &rtn);
        let (base, before, on_grid) = (Fingerprint::of(&model), logits(&model), codes(&model));
        let attached = peft::attach(&mut model, &Peqa::new()).unwrap();
        prop_assert_eq!(attached.paths, ["mlp.up", "mlp.down"]);
        prop_assert_eq!(logits(&model), before.clone());

        tune(&mut model, seed);
        let tuned = logits(&model);
        prop_assert_ne!(&tuned, &before);
        prop_assert_eq!(Fingerprint::of(&model), base);

        let certificate = peft::merge(&mut model).unwrap();
        prop_assert!(certificate.is_exact());
        prop_assert_eq!(logits(&model), tuned);
        prop_assert_eq!(codes(&model), on_grid);
        certificate.verify(&model).unwrap();
        let mut other = model.clone();
        other.embedding = other.embedding.map(|embedding| embedding + 1e-3);
        for stranger in [quantized(seed, &rtn), other] {
            let refused = matches!(certificate.verify(&stranger), Err(Error::NotMerged { .. }));
            prop_assert!(refused);
        }
        prop_assert!(matches!(peft::merge(&mut model), Err(Error::NoAdapters)));
    }

    /// Attaching changes no output; merging into a dense weight none by more than the certificate
    /// says, and merging into a packed one is refused.
    #[test]
    fn lora_merges_within_its_certificate((lora, seed) in (loras(), 0..1000u64)) {
        let mut model = dense(seed);
        let (base, before) = (Fingerprint::of(&model), logits(&model));
        let attached = peft::attach(&mut model, &lora).unwrap();
        prop_assert_eq!(attached.paths, ["mlp.up", "mlp.down"]);
        prop_assert_eq!(logits(&model), before.clone());
        tune(&mut model, seed);
        let adapted = model.clone();
        prop_assert_ne!(logits(&adapted), before);
        prop_assert_eq!(Fingerprint::of(&model), base.clone());

        let certificate = peft::merge(&mut model).unwrap();
        prop_assert!(!certificate.is_exact());
        prop_assert!(certificate.to_string().starts_with("bounded merge of 2 layers (lora); 0 of them"));
        certificate.verify(&model).unwrap();
        prop_assert_ne!(Fingerprint::of(&model), base);
        for (at, layer) in certificate.layers.iter().enumerate() {
            let (before, after) = (adapted.linears()[at].1, model.linears()[at].1);
            prop_assert!(after.adapter().is_none());
            prop_assert_eq!(layer.format, None);
            prop_assert_ne!(layer.exactness, Exactness::Exact);
            let x = numbers(seed + 7, before.weight().dims()[0]);
            let y = |linear: &Linear| {
                let x = Tensor::<1>::from_floats(x.as_slice(), &Device::flex()).unsqueeze::<2>();
                linear.forward(x).into_data().try_into_vec::<f32>().unwrap()
            };
            for ((before, after), terms) in y(before).into_iter().zip(y(after)).zip(magnitudes(before, &x)) {
                let (before, after) = (f64::from(before), f64::from(after));
                // The bias is added with a rounding each.
                let bias = (before.abs() + after.abs()) * 2f64.powi(-24);
                let bound = layer.exactness.bound() * terms + bias;
                prop_assert!((before - after).abs() <= bound, "{} {} {}", before, after, bound);
            }
        }
    }

    #[test]
    fn lora_stays_beside_a_packed_weight(lora in loras(), rtn in formats(), seed in 0..1000u64) {
        let mut model = quantized(seed, &rtn);
        let before = logits(&model);
        peft::attach(&mut model, &lora).unwrap();
        prop_assert_eq!(logits(&model), before);
        tune(&mut model, seed);
        let tuned = logits(&model);
        let error = peft::merge(&mut model).unwrap_err();
        let named = matches!(&error, Error::MergeIntoPacked { path, .. } if path == "mlp.up");
        prop_assert!(named, "{}", error);
        prop_assert_eq!(logits(&model), tuned);
    }

    #[test]
    fn only_adapters_have_gradients(case in cases(), seed in 0..1000u64) {
        let mut model = case.base(seed);
        case.attach(&mut model);
        // A fresh `B` of LoRA gives `A` a gradient of zero.
        tune(&mut model, seed);
        let model = model.train();
        let loss = token_nll(&model, &batch(seed, [2, 9])).sum();
        let gradients = burn::optim::GradientsParams::from_grads(loss.backward(), &model);
        let mut visitor = Gradients { gradients: &gradients, path: vec![], with: vec![], without: vec![] };
        model.visit(&mut visitor);
        prop_assert_eq!(visitor.with.len(), 2 * case.n_parameters());
        prop_assert!(visitor.with.iter().all(|path| path.contains("adapter")));
        prop_assert!(visitor.without.iter().all(|path| !path.contains("adapter")));
    }

    /// Blocks that are run again give the same losses, gradients and parameters, whatever trains.
    #[test]
    fn checkpointing_changes_no_bit(case in cases(), seed in 0..1000u64, trained in 0..4usize) {
        let mut model = case.base(seed);
        match trained {
            0 => case.attach(&mut model),
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
        let base = case.base(seed);
        let mut tasks = Vec::new();
        for task in 0..2 {
            let mut model = base.clone();
            case.attach(&mut model);
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
        Err(Error::OutputExists { .. })
    ));
    assert!(Adapters::load(&path, &Device::flex()).is_ok());

    let path = write("truncated");
    let file = path.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for n in [0, 7, 100, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..n]).unwrap();
        let error = load(&path);
        assert!(matches!(&error, Error::File { .. }), "{n}: {error}");
    }
    std::fs::write(
        &file,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    assert!(load(&path).to_string().contains("git lfs pull"));
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(load(&path), Error::Io { .. }));

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
        matches!(&error, Error::MissingTensor { tensor, .. } if tensor.starts_with("mlp.gate"))
    );
    let error = config("extra", "\"mlp.up\": \"peqa\"", "\"mlp.down\": \"peqa\"");
    assert!(
        matches!(&error, Error::Tensor { tensor, .. } if tensor.starts_with("mlp.up")),
        "{error}"
    );
    assert!(
        config("method", "peqa", "ia3")
            .to_string()
            .contains("unknown adapter method `ia3`")
    );
    assert!(
        config("version", "\"format_version\": 1", "\"format_version\": 2")
            .to_string()
            .contains("is 2")
    );
    assert!(matches!(config("json", "{", "["), Error::File { .. }));
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
    let write = |[a, b]: [[usize; 2]; 2], alpha: Vec<f32>| {
        let mut tensors = Vec::new();
        for (name, dims) in [("a", a), ("b", b), ("alpha", [alpha.len(), 1])] {
            let alpha = alpha.clone();
            let values = move || match name {
                "alpha" => alpha.clone(),
                _ => vec![0.5; dims[0] * dims[1]],
            };
            let tensor = match name {
                "alpha" => LazyTensor::f32([dims[0]], values),
                _ => LazyTensor::f32(dims, values),
            };
            tensors.push((format!("mlp.down.{name}"), tensor));
        }
        peft::files::write_tensors(&file, tensors).unwrap();
        Adapters::load(&path, &Device::flex()).unwrap_err()
    };
    for (dims, alpha, bad) in [
        ([[20, 2], [3, 16]], vec![1.0], "mlp.down.b"),
        ([[20, 0], [0, 16]], vec![1.0], "mlp.down.b"),
        ([[20, 2], [2, 16]], vec![], "mlp.down.alpha"),
        ([[20, 2], [2, 16]], vec![1.0, 1.0], "mlp.down.alpha"),
        ([[20, 2], [2, 16]], vec![-1.0], "mlp.down.alpha"),
    ] {
        let error = write(dims, alpha);
        let named = matches!(&error, Error::Tensor { tensor, .. } if tensor == bad);
        assert!(named, "{bad}: {error}");
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
    let error = peft::files::write_directory(&target, |staging| {
        std::fs::write(staging.join("half"), "written").unwrap();
        Err(Error::NoBatches)
    });
    assert!(matches!(error, Err(Error::NoBatches)));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // An empty directory may be filled, a file may not be replaced.
    std::fs::create_dir(&target).unwrap();
    peft::files::write_directory(&target, |_| Ok(())).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "something else").unwrap();
    let error = peft::files::write_directory(&file, |_| Ok(()));
    assert!(matches!(error, Err(Error::OutputExists { .. })));
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
