//! A training by the processes of `mpirun`. A binary of its own, which `mpirun` starts again.
#![cfg(feature = "mpi")]

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use peft::{
    Batch, Blocks, CausalLm, FitConfig, Group, Head, Linear, Linears, Lora, Mpi, Spans, Weight,
    attach, fit, fit_in,
};

/// The variable with the directory that members write to.
const FOLDER: &str = "MPI_TEST_FOLDER";

/// Predicts each token from the one before it.
#[derive(Module, Debug)]
struct Bigram {
    embedding: Param<Tensor<2>>,
    proj: Linear,
}

impl Linears for Bigram {
    fn linears(&self) -> Vec<(String, &Linear)> {
        vec![("proj".into(), &self.proj)]
    }

    fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        vec![("proj".into(), &mut self.proj)]
    }
}

impl Blocks for Bigram {
    type Positions = ();

    fn vocab_size(&self) -> usize {
        16
    }

    fn n_blocks(&self) -> usize {
        1
    }

    fn positions(&self, _: &Spans) {}

    fn embed(&self, tokens: Tensor<2, Int>, (): &()) -> Tensor<3> {
        let [batch, seq] = tokens.dims();
        let x = self
            .embedding
            .val()
            .select(0, tokens.reshape([batch * seq]));
        x.reshape([batch, seq, 16])
    }

    fn block(&self, _: usize, x: Tensor<3>, (): &()) -> Tensor<3> {
        self.proj.forward(x)
    }
}

impl CausalLm for Bigram {
    fn norm(&self, x: Tensor<3>) -> Tensor<3> {
        x
    }

    fn head(&self) -> Head<'_> {
        self.embedding.val().transpose().into()
    }
}

/// The training of every member: the model, its data and the settings.
fn training() -> (Bigram, Vec<Batch>, FitConfig) {
    let device = Device::flex();
    device.seed(1);
    let normal =
        |deviation| Tensor::<2>::random([16, 16], Distribution::Normal(0.0, deviation), &device);
    let mut model = Bigram {
        embedding: Param::from_tensor(normal(1.0)).set_require_grad(false),
        proj: Linear::new(Weight::frozen(normal(0.3)), None),
    };
    attach(&mut model, &Lora::new(4).with_dropout(0.25)).unwrap();
    let batch = |at: i32| {
        let tokens: Vec<i32> = (0..18).map(|i| (i * (at + 3) + at) % 16).collect();
        let tokens = TensorData::new(tokens, [2, 9]);
        Batch::new(Tensor::<2, Int>::from_data(tokens, &device)).unwrap()
    };
    let config = FitConfig::new().with_learning_rate(0.05).with_epochs(3);
    (
        model,
        (0..5).map(batch).collect(),
        config.with_accumulation(2),
    )
}

/// The bits of the adapter, and of the losses of all steps.
fn result(model: &Bigram, losses: &[f64]) -> Vec<u8> {
    let [a, b] = match model.proj.adapter().unwrap() {
        peft::Adapter::Lora(lora) => [lora.a(), lora.b()],
        other => panic!("{other:?}"),
    };
    let values = [a, b].map(|factor| factor.into_data().try_into_vec::<f32>().unwrap());
    let values = values.concat().into_iter().flat_map(f32::to_le_bytes);
    let losses = losses.iter().flat_map(|loss| loss.to_le_bytes());
    values.chain(losses).collect()
}

/// What `mpirun` runs, in each of its processes; nothing without the folder.
#[test]
fn member() {
    let Some(folder) = env::var_os(FOLDER) else {
        return;
    };
    let group = Mpi::join().unwrap();
    let (mut model, batches, config) = training();
    let mut losses = Vec::new();
    fit_in(&mut model, &batches, &config, &group, |step, _| {
        losses.push(step.loss)
    })
    .unwrap();
    assert_eq!(group.size(), 2);
    let path = Path::new(&folder).join(group.rank().to_string());
    fs::write(path, result(&model, &losses)).unwrap();
}

#[test]
fn two_processes_are_one_that_accumulates() {
    let (mut model, batches, config) = training();
    let mut losses = Vec::new();
    fit(&mut model, &batches, &config, |step, _| {
        losses.push(step.loss)
    })
    .unwrap();
    let expected = result(&model, &losses);

    let folder = tempfile::tempdir().unwrap();
    let output = Command::new("mpirun")
        .args(["-np", "2", "--oversubscribe"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", "member"])
        .env(FOLDER, folder.path())
        // Where the tests are run by root.
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    for rank in 0..2 {
        let found = fs::read(folder.path().join(rank.to_string())).unwrap();
        assert!(found == expected, "process {rank} has another model");
    }
}
