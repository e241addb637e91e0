use std::convert::Infallible;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use peft::{Linears, Stages, Weight};

use super::*;
use crate::Model;
use crate::source::{HEAD, Vector, weight_name};
use peft::Table;

/// A source that fills each parameter with the index of its name.
#[derive(Default)]
struct Named(Vec<String>);

impl Named {
    fn parameter<const D: usize>(&mut self, name: String, dims: [usize; D]) -> Param<Tensor<D>> {
        let index = self.0.len() as f64;
        self.0.push(name);
        Param::from_tensor(Tensor::full(dims, index, &Device::flex()))
    }

    #[track_caller]
    fn assert_name<const D: usize>(&self, values: Tensor<D>, name: &str) {
        let index = values.max().into_scalar::<f32>() as usize;
        assert_eq!(self.0[index], name);
    }
}

impl Source for Named {
    type Error = Infallible;

    fn vector(
        &mut self,
        path: &str,
        kind: Vector,
        len: usize,
    ) -> Result<Param<Tensor<1>>, Infallible> {
        Ok(self.parameter(kind.name(path), [len]))
    }

    fn table(&mut self, path: &str, dims: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
        Ok(self.parameter(weight_name(path), dims))
    }

    fn weight(&mut self, path: &str, dims: [usize; 2]) -> Result<Weight, Infallible> {
        self.table(path, dims).map(Weight::Dense)
    }

    fn head(&mut self, dims: [usize; 2]) -> Result<Weight, Infallible> {
        self.weight(HEAD, dims)
    }
}

/// The smallest models of every architecture, with all of its parts.
fn configs() -> [Config; 3] {
    let llama = LlamaConfig::default()
        .with_vocab_size(8)
        .with_hidden_size(6)
        .with_intermediate_size(10)
        .with_num_hidden_layers(2)
        .with_num_attention_heads(4)
        .with_num_key_value_heads(2)
        .with_head_dim(2)
        .with_attention_bias(true)
        .with_attention_output_bias(true)
        .with_mlp_bias(true);
    let opt = OptConfig::default()
        .with_vocab_size(8)
        .with_hidden_size(6)
        .with_ffn_dim(10)
        .with_num_hidden_layers(2)
        .with_num_attention_heads(3)
        .with_max_position_embeddings(4)
        .with_word_embed_proj_dim(6);
    let projected = opt
        .clone()
        .with_word_embed_proj_dim(5)
        .with_do_layer_norm_before(false)
        .with_tie_word_embeddings(false);
    [llama.into(), opt.into(), projected.into()]
}

#[test]
fn every_parameter_is_the_one_of_its_name() {
    for config in configs() {
        let mut source = Named::default();
        let Ok(model) = Model::build(config.clone(), &mut source);
        let mut n = 0;
        let mut check = |name: &str, values: Tensor<1>| {
            source.assert_name(values, name);
            n += 1;
        };
        let projections = config.projections();
        assert_eq!(projections.len(), model.linears().len());
        for ((path, linear), (planned, dims)) in model.linears().into_iter().zip(projections) {
            assert_eq!((&path, linear.weight().dims()), (&planned, dims));
            check(
                &weight_name(&path),
                linear.weight().to_dense().flatten(0, 1),
            );
            if let Some(bias) = linear.bias() {
                check(&Vector::Bias.name(&path), bias);
            }
        }
        for (name, table) in model.tables() {
            let values = match table {
                Table::Vector(vector) => vector.val(),
                Table::Matrix(table) => table.val().flatten(0, 1),
            };
            check(&name, values);
        }
        for (path, weight) in model.other_weights() {
            check(&weight_name(&path), weight.to_dense().flatten(0, 1));
        }
        assert_eq!(n, source.0.len());

        let mut again = model.clone();
        let paths = again.linears_mut().into_iter().map(|(path, linear)| {
            source.assert_name(linear.weight().to_dense(), &weight_name(&path));
            path
        });
        let paths: Vec<String> = paths.collect();
        assert_eq!(model.stages().last().unwrap().end, paths.len());
    }
}

#[test]
fn every_architecture_has_a_configuration() {
    for (model_types, _) in READERS {
        let is_read = |config: &Config| {
            let json = config.to_json();
            let model_type = json["model_type"].as_str();
            model_type.is_some_and(|model_type| model_types.contains(&model_type))
        };
        assert!(configs().iter().any(is_read), "none of {model_types:?}");
    }
}
