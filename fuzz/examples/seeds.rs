//! Writes the seeds of all targets into `seeds`: `fuzz/run.sh seeds`.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use evaluate::{Bootstrap, Measurement, Report};
use fuzz::{
    ADAPTER_FILES, CHECKPOINT_FILES, INDEX_FILES, SEPARATOR, TASK_FILES, TOKENIZER_FILES,
    VOCABULARY_FILES, fixtures, tensors_text,
};
use models::{CheckpointFormat, Config, GptqVersion, Model, Pretrained};
use peft::{Adapters, Bayesian, Lora, Method, Peqa, TaskPack, Tile, Vera};
// What is built with the flags of the targets needs their runtime.
use libfuzzer_sys as _;
use quant_core::{DoubleQuant, NormalFloat, Quantizer, Rtn};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":7,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"Lowercase"},"pre_tokenizer":{"type":"Whitespace"},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"</s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"</s>":{"id":"</s>","ids":[7],"tokens":["</s>"]}}},"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1,"c":2,"d":3,"e":4,"f":5,"g":6,"</s>":7},"unk_token":"a"}}"#;

const BPE: &str = r#"{"added_tokens":[],"normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"a":0,"b":1,"ab":2,"abb":3},"merges":["a b","ab b"]}}"#;

const UNIGRAM: &str = r#"{"added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"_"},{"type":"Replace","pattern":{"Regex":" +"},"content":"_"},{"type":"NFKC"}]},"pre_tokenizer":{"type":"Split","pattern":{"String":"b"},"behavior":"Isolated","invert":false},"post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"_"},"content":" "},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["_",-1.5],["a",-2.0],["ab",-2.5]],"byte_fallback":false}}"#;

const LLAMA2: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim }}{% endif %}{% endfor %}";

const CHATML: &str = "{%- macro line(m) -%}{{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>' }}{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{{ line(m) }}{% endgeneration %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ messages | tojson(indent=2) }}{{ range(3) | list | join(',') }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' * 1 }}{% endif %}";

const RECORD: &str = r#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1 + 1? "}, {"role": "assistant", "content": "2"}], "question": "1 + 1?", "answer": "2"}"#;

fn main() -> Result<()> {
    let scratch = tempdir()?;
    let seeds = Seeds(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds"));
    let tokenizer = scratch.join("tokenizer.json");
    fs::write(&tokenizer, TOKENIZER)?;
    let lm = |config: Config| Pretrained::new(Model::init(config, 1, &Device::flex()), &tokenizer);
    let quantized = |config: Config, quantizer: &dyn Quantizer| -> Result<Pretrained> {
        let mut lm = lm(config)?;
        models::quantize(&mut lm.model, &quantizer, &[], |_| {})?;
        Ok(lm)
    };
    let llama = || Config::from(fixtures::llama());
    let opt = || Config::from(fixtures::opt());

    for (name, config) in [("llama", llama()), ("opt", opt())] {
        let json = serde_json::to_string(&config.to_json())?;
        seeds.write("config", name, &[json.as_bytes()])?;
        let dir = scratch.join(format!("dense-{name}"));
        models::save(&lm(config)?, &dir)?;
        let weights = dir.join("model.safetensors");
        seeds.write("safetensors", name, &[&fs::read(&weights)?])?;
        seeds.directory("exact", &format!("dense-{name}"), &CHECKPOINT_FILES, &dir)?;
        shards(&dir, &weights)?;
        seeds.directory("index", name, &INDEX_FILES, &dir)?;
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/models/tests/golden/gguf");
    for name in ["llama", "qwen2"] {
        let file = fs::read(golden.join(name).with_extension("gguf"))?;
        seeds.write("gguf", name, &[&file])?;
    }
    let mut yarn = fixtures::llama().to_json();
    yarn["model_type"] = "qwen2".into();
    yarn["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0,
        "original_max_position_embeddings": 4, "mscale": 1.0, "mscale_all_dim": 0.5});
    seeds.write(
        "config",
        "yarn",
        &[serde_json::to_string(&yarn)?.as_bytes()],
    )?;
    let mut llama3 = fixtures::llama().to_json();
    llama3["model_type"] = "mistral".into();
    llama3.insert("sliding_window".into(), json!(16));
    llama3["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8});
    seeds.write(
        "config",
        "llama3",
        &[serde_json::to_string(&llama3)?.as_bytes()],
    )?;

    let affine = Rtn::new().with_group_size(4).with_f16_scales(true);
    let rtn = |bits: usize, symmetric: bool| {
        let rtn = Rtn::new().with_bits(bits).with_symmetric(symmetric);
        rtn.with_group_size(4)
    };
    let nf = NormalFloat::new().with_block_size(4);
    let double = nf.clone().with_double_quant(DoubleQuant::dynamic());
    let exact: [(&str, Config, &dyn Quantizer); 4] = [
        ("affine", llama(), &rtn(4, false)),
        ("symmetric", opt(), &rtn(3, true)),
        ("two-bits", llama(), &rtn(2, false)),
        ("double", llama(), &double),
    ];
    for (name, config, quantizer) in exact {
        let dir = scratch.join(format!("exact-{name}"));
        models::save(&quantized(config, quantizer)?, &dir)?;
        seeds.directory("exact", name, &CHECKPOINT_FILES, &dir)?;
    }
    let gptq: [(&str, Config, Rtn, GptqVersion); 3] = [
        ("v2", llama(), affine.clone(), GptqVersion::V2),
        (
            "v1",
            llama(),
            affine.clone().with_symmetric(true),
            GptqVersion::V1,
        ),
        ("opt", opt(), affine.with_bits(8), GptqVersion::V2),
    ];
    for (name, config, rtn, version) in gptq {
        let dir = scratch.join(format!("gptq-{name}"));
        models::save_as(
            &quantized(config, &rtn)?,
            &dir,
            CheckpointFormat::Gptq(version),
        )?;
        seeds.directory("gptq", name, &CHECKPOINT_FILES, &dir)?;
    }
    let wide = fixtures::llama()
        .with_hidden_size(32)
        .with_intermediate_size(32);
    let wide = || Config::from(wide.clone().with_head_dim(16));
    let nf = NormalFloat::new().with_block_size(32);
    let double = nf.clone().with_double_quant(DoubleQuant::dynamic());
    for (name, nf) in [("plain", nf), ("double", double)] {
        let dir = scratch.join(format!("bitsandbytes-{name}"));
        models::save_as(
            &quantized(wide(), &nf)?,
            &dir,
            CheckpointFormat::Bitsandbytes,
        )?;
        seeds.directory("bitsandbytes", name, &CHECKPOINT_FILES, &dir)?;
    }

    let methods: [(&str, &dyn Method, [bool; 2]); 8] = [
        ("lora", &Lora::new(2), [true, true]),
        (
            "dora",
            &Lora::new(2).with_dora(true).with_bias(true),
            [false, true],
        ),
        ("vera", &Vera::new(2), [true, true]),
        ("peqa", &Peqa::new().with_zeros(true), [true, false]),
        (
            "qa-lora",
            &Tile::qa_lora(1).with_pooling(peft::Pooling::Peft),
            [true, false],
        ),
        ("qa-hira", &Tile::qa_hira(), [true, false]),
        ("q-bara", &Tile::q_bara(1), [true, true]),
        ("bayesian", &Bayesian::new(2), [true, true]),
    ];
    for (name, method, bases) in methods {
        let models = [
            ("packed", fixtures::packed_model()),
            ("dense", fixtures::dense_model()),
        ];
        for ((base, model), _) in models.into_iter().zip(bases).filter(|(_, is_for)| *is_for) {
            let mut adapted = model.clone();
            peft::attach(&mut adapted, method)?;
            let adapters = Adapters::of(&adapted)?;
            let dir = scratch.join(format!("adapters-{name}-{base}"));
            adapters.save(&dir)?;
            let name = format!("{name}-{base}");
            seeds.directory("adapters", &name, &ADAPTER_FILES, &dir)?;
            let dir = scratch.join(format!("peft-{name}"));
            if adapters.save_hf(&dir, &model).is_ok() {
                seeds.directory("peft", &name, &ADAPTER_FILES, &dir)?;
            }
        }
    }
    let tuned = ["task", "merged"].map(|_| fixtures::packed_model());
    let [mut task, mut merged] = tuned;
    peft::attach(&mut task, &Peqa::new().with_zeros(true))?;
    let dir = scratch.join("changed");
    Adapters::of(&task)?.save(&dir)?;
    let mut text = tensors_text(&dir.join(ADAPTER_FILES[1]));
    // Other factors than 1, so that the task has changes.
    let ones = String::from_utf8(text)?.replace(" 00000000", " 0000003e");
    text = ones.into_bytes();
    fs::write(dir.join(ADAPTER_FILES[1]), fuzz::tensors_file(&text))?;
    peft::activate(&mut task, &Adapters::load(&dir, &Device::flex())?)?;
    let dir = scratch.join("task");
    TaskPack::of(&task)?.save(&dir)?;
    seeds.directory("tasks", "peqa", &TASK_FILES, &dir)?;

    peft::attach(&mut merged, &Tile::qa_lora(1))?;
    let certificate = serde_json::to_string(&peft::merge(&mut merged)?)?;
    seeds.write("certificate", "bounded", &[certificate.as_bytes()])?;
    let certificate = serde_json::to_string(&peft::merge(&mut task)?)?;
    seeds.write("certificate", "exact", &[certificate.as_bytes()])?;

    let special = r#"{"bos_token": "</s>", "eos_token": {"content": "</s>"}, "pad_token": null}"#;
    let map = r#"{"unk_token": "a"}"#;
    for (name, tokenizer) in [("words", TOKENIZER), ("bpe", BPE), ("unigram", UNIGRAM)] {
        let [special, map] = if name == "words" {
            [special, map]
        } else {
            ["", ""]
        };
        let parts = [tokenizer, special, map, "a abb  c A b"].map(str::as_bytes);
        assert_eq!(parts.len(), TOKENIZER_FILES.len());
        seeds.write("tokenizer", name, &parts)?;
    }
    let text = "a abb  c A b".as_bytes();
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/models/tests/golden/tokenizers");
    for name in ["llama", "unigram_plain"] {
        let model = fs::read(golden.join(name).join("tokenizer.model"))?;
        let stated = fs::read(golden.join(name).join("tokenizer_config.json"))?;
        let parts: [&[u8]; 6] = [&model, b"", b"", b"", &stated, text];
        assert_eq!(parts.len(), VOCABULARY_FILES.len());
        seeds.write("vocabulary", name, &parts)?;
    }
    let vocab = br#"{"a": 0, "b": 1, "ab": 2, "abb": 3}"#;
    let merges = b"#version: 0.2\na b\nab b\n";
    let stated =
        br#"{"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": true}"#;
    let parts: [&[u8]; 6] = [b"", vocab, merges, br#"{"<s>": 4}"#, stated, text];
    seeds.write("vocabulary", "bytes", &parts)?;
    for (name, template) in [("llama2", LLAMA2), ("chatml", CHATML)] {
        seeds.write("template", name, &[template.as_bytes(), RECORD.as_bytes()])?;
    }
    seeds.write(
        "records",
        "lines",
        &[format!("{RECORD}\r\n\n{{\"a\": [1, \"\\u00e9\"]}}\n").as_bytes()],
    )?;
    seeds.write(
        "records",
        "array",
        &[format!("\u{feff}[{RECORD}, {{\"a\": null}}]").as_bytes()],
    )?;

    let mut report = Report::new("Held-out text").with_setting("seed", 0);
    let nll = Bootstrap::new().mean(&[1.2, 1.4, 1.1])?;
    for (model, metric) in [
        ("4 bits", "perplexity"),
        ("4 bits", "nll"),
        ("3 bits", "nll"),
    ] {
        report.measurements.push(Measurement {
            protocol: "gptq".into(),
            metric: metric.into(),
            model: model.into(),
            estimate: nll.clone().map(f64::exp),
            unit: "windows".into(),
            lower_is_better: true,
        });
    }
    seeds.write("report", "two-models", &[report.to_json().as_bytes()])?;
    fs::remove_dir_all(scratch)?;
    Ok(())
}

fn tempdir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("seeds-{}", std::process::id()));
    fs::create_dir(&dir)?;
    Ok(dir)
}

/// The directory of the seeds.
struct Seeds(PathBuf);

impl Seeds {
    fn write(&self, target: &str, name: &str, parts: &[&[u8]]) -> Result<()> {
        let dir = self.0.join(target);
        fs::create_dir_all(&dir)?;
        Ok(fs::write(dir.join(name), parts.join(SEPARATOR))?)
    }

    /// The files of a directory.
    fn directory(&self, target: &str, name: &str, files: &[&str], dir: &Path) -> Result<()> {
        let parts = files.iter().map(|file| {
            let path = dir.join(file);
            if !path.exists() {
                return Ok(Vec::new());
            }
            if file.ends_with(".safetensors") {
                return Ok(tensors_text(&path));
            }
            let json: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
            Ok(serde_json::to_vec(&json)?)
        });
        let parts: Vec<Vec<u8>> = parts.collect::<Result<_>>()?;
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        self.write(target, name, &parts)
    }
}

/// Cuts the weights of a directory into two files with an index.
fn shards(dir: &Path, weights: &Path) -> Result<()> {
    let text = String::from_utf8(tensors_text(weights))?;
    let lines: Vec<&str> = text.lines().collect();
    let (one, two) = lines.split_at(lines.len() / 2);
    let mut map = serde_json::Map::new();
    for (name, lines) in [("one.safetensors", one), ("two.safetensors", two)] {
        fs::write(
            dir.join(name),
            fuzz::tensors_file(lines.join("\n").as_bytes()),
        )?;
        for line in lines {
            let tensor = line.split(' ').next().unwrap_or_default();
            map.insert(tensor.into(), name.into());
        }
    }
    let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
    Ok(fs::write(
        dir.join("model.safetensors.index.json"),
        index.to_string(),
    )?)
}
